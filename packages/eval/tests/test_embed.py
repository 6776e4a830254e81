"""Features in files for other programs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors import safe_open
from vitreg_core.config import ViTConfig, override
from vitreg_core.data.images import read_image
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer
from vitreg_eval import exporting
from vitreg_eval.config import EmbedOptions, KnnOptions
from vitreg_eval.datasets import labelled_folder
from vitreg_eval.extract import extract
from vitreg_eval.tasks import embed

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, registers=2)
ALL = ("cls", "registers", "patches", "mean_patch")
SHAPES = {"cls": (24,), "registers": (2, 24), "patches": (16, 24), "mean_patch": (24,)}


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(CONFIG).eval()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of random photos in train and val."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(5):
            folder = tmp_path / "photos" / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}{index}.png")
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "CHUNK", 3 * 4 * 24)  # less than a row


def write(model: VisionTransformer, out: Path, **options: object) -> Path:
    out.mkdir(exist_ok=True)
    given = override(EmbedOptions(), options)
    outcome = embed.run(model, given, out)
    (path,) = out.glob("features.*")
    assert str(path) in outcome.notes[0]
    return path


def expected(model: VisionTransformer, photos: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Of the model alone, one image after another."""
    paths = sorted((photos / "val").rglob("*.png"))
    with torch.no_grad():
        found = [model(model.preprocess(read_image(path))[None]) for path in paths]
    kinds = {"cls": [f.cls for f in found], "registers": [f.registers for f in found]}
    kinds |= {"patches": [f.patches for f in found], "mean_patch": [f.patches.mean(dim=1) for f in found]}
    return {name: torch.cat(values).numpy() for name, values in kinds.items()}, [path.name for path in paths]


def test_npz_holds_tokens_names_and_labels(model: VisionTransformer, photos: Path, tmp_path: Path) -> None:
    tokens, names = expected(model, photos)
    with np.load(write(model, tmp_path / "out", data=photos, tokens="cls,registers,patches,mean_patch")) as found:
        assert set(found) == {*ALL, "names", "grid", "labels", "classes"}
        for name in ALL:
            assert found[name].shape == (5, *SHAPES[name])
            np.testing.assert_allclose(found[name], tokens[name], atol=1e-5)
        assert [Path(name).name for name in found["names"]] == names
        assert found["labels"].tolist() == [0, 0, 0, 1, 1]
        assert found["classes"].tolist() == ["class0", "class1"]
        assert found["grid"].tolist() == [4, 4]


def test_safetensors_are_read_by_its_library(model: VisionTransformer, photos: Path, tmp_path: Path) -> None:
    tokens, _ = expected(model, photos)
    path = write(model, tmp_path / "out", data=photos, tokens=ALL, format="safetensors", dtype="fp16")
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # so that values are aligned when mapped
    with safe_open(path, "np") as found:
        assert set(found.keys()) == {*ALL, "labels"}
        for name in ALL:
            values = found.get_tensor(name)
            assert (values.dtype, values.shape) == (np.float16, (5, *SHAPES[name]))
            np.testing.assert_allclose(values, tokens[name], atol=3e-3)
        assert found.get_tensor("labels").tolist() == [0, 0, 0, 1, 1]
        assert found.metadata()["classes"] == '["class0", "class1"]'
        assert "val0.png" in found.metadata()["names"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 3e-3)])
def test_parquet_has_a_row_for_each_image(
    model: VisionTransformer, photos: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    tokens, names = expected(model, photos)
    path = write(model, tmp_path / "out", data=photos, tokens=ALL, format="parquet", dtype=dtype)
    table = parquet.read_table(path)
    assert parquet.ParquetFile(path).num_row_groups == 5
    for name in ALL:
        values = np.array(table[name].to_pylist(), np.float32).reshape(5, *SHAPES[name])
        np.testing.assert_allclose(values, tokens[name], atol=tolerance)
    assert [Path(name).name for name in table["name"].to_pylist()] == names
    assert table["class"].to_pylist() == ["class0"] * 3 + ["class1"] * 2
    assert table["label"].to_pylist() == [0, 0, 0, 1, 1]
    assert table.schema.metadata[b"grid"] == b"[4, 4]"
    assert b'"patches": [16, 24]' in table.schema.metadata[b"shape"]


def test_photos_without_labels_are_named_by_their_place(model: VisionTransformer, photos: Path, tmp_path: Path) -> None:
    with np.load(write(model, tmp_path / "out", images=photos, layer=0, norm=False)) as found:
        assert set(found) == {"cls", "names", "grid"}
        assert found["names"].tolist()[:2] == ["train/class0/train0.png", "train/class0/train2.png"]
        first = model.preprocess(read_image(photos / found["names"][0]))[None]
        with torch.no_grad():
            (layer,) = model.intermediate(first, [0], norm=False)
        np.testing.assert_allclose(found["cls"][:1], layer.cls, atol=1e-5)
    path = write(model, tmp_path / "rows", images=photos, format="parquet")
    assert parquet.read_table(path).column_names == ["name", "cls"]


def test_nothing_else_stays_in_the_folder(model: VisionTransformer, photos: Path, tmp_path: Path) -> None:
    path = write(model, tmp_path / "out", data=photos)
    assert sorted(found.name for found in path.parent.iterdir()) == ["features.npz", "manifest.json"]
    with np.load(path) as found:
        before = found["cls"]
    with np.load(write(model, tmp_path / "out", data=photos)) as found:
        np.testing.assert_array_equal(found["cls"], before)
    write(model, tmp_path / "cached", data=photos, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("photos-val-*/cls.npy"))) == 1


def test_what_else_is_in_the_folder_stays(model: VisionTransformer, photos: Path, tmp_path: Path) -> None:
    for name in ("mine.npy", "cls.npy", "shards/000000000.json", "shards/train-0.tar"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"mine")
    with np.load(write(model, tmp_path / "out", data=photos)) as found:
        assert found["cls"].shape == (5, 24)
    for name in ("mine.npy", "cls.npy", "shards/000000000.json", "shards/train-0.tar"):
        assert (tmp_path / "out" / name).read_bytes() == b"mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(InputError, match=r"other/manifest.json: not that of features; give another folder$"):
        write(model, tmp_path / "other", data=photos)


def test_a_stopped_command_goes_on(
    model: VisionTransformer, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitreg_eval.store.SHARD", 2)

    def interrupt(path: Path, found: exporting.Embedded) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(exporting.WRITERS, "npz", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(model, tmp_path / "out", data=photos)
    monkeypatch.setitem(exporting.WRITERS, "npz", exporting.write_npz)
    monkeypatch.setattr(model, "features", lambda _: pytest.fail("computed again, though all is on the disk"))
    with np.load(write(model, tmp_path / "out", data=photos)) as found:
        assert found["cls"].shape == (5, 24)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["features.npz", "manifest.json"]


def test_a_folder_with_features_of_another_model_is_refused(
    model: VisionTransformer, photos: Path, tmp_path: Path
) -> None:
    path = write(model, tmp_path / "out", data=photos)
    before = path.read_bytes()
    torch.manual_seed(1)
    other = VisionTransformer(CONFIG).eval()
    with pytest.raises(InputError, match=r"out: holds features of another model \(other weights\): model is"):
        write(other, tmp_path / "out", data=photos)
    with pytest.raises(InputError, match="holds features of other tokens"):
        write(model, tmp_path / "out", data=photos, tokens="patches")
    assert path.read_bytes() == before
    images = labelled_folder(other.preprocess, photos, "val", 64)
    with pytest.raises(InputError, match=r"out: holds features of another model \(other weights\): model is"):
        extract(other, images, KnnOptions(cache=tmp_path / "out"))


def test_what_cannot_be_embedded_is_refused(model: VisionTransformer, photos: Path, tmp_path: Path) -> None:
    bare = VisionTransformer(override(CONFIG, {"registers": 0})).eval()
    with pytest.raises(InputError, match="--tokens cls,registers: this model has no registers; leave them out"):
        write(bare, tmp_path / "out", images=photos, tokens="cls,registers")
    with pytest.raises(InputError, match="layer 5 of a model with 2 blocks"):
        write(model, tmp_path / "out", images=photos, layer=5)
    with pytest.raises(InputError, match="patch: give some of cls, registers, patches, mean_patch"):
        override(EmbedOptions(), {"tokens": "cls,patch"})
    with pytest.raises(InputError, match="give photos or a labelled data set"):
        EmbedOptions(images=photos, data=photos).needs()
    with pytest.raises(InputError, match="--registers is how many a model computes with"):
        EmbedOptions(images=photos, registers=(1,)).needs()
    assert EmbedOptions(model=("x",)).needs() == ["--images DIR or --data DIR, what to embed"]
    assert EmbedOptions(model=("x",), images=photos).needs() == []


def test_several_processes_need_a_cache(
    model: VisionTransformer, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="3 processes share features through a folder: give --cache DIR"):
        write(model, tmp_path / "out", images=photos)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    found = exporting.Embedded({"cls": torch.zeros(2, 3)}, None, ["a", "b"], (), (1, 1))
    (tmp_path / "features.npz").mkdir()
    with pytest.raises(InputError, match=r"features\.npz: cannot be written .*; make room, or give another --out"):
        exporting.write_npz(tmp_path / "features.npz", found)
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]


def test_rows_that_show_several_classes_are_written(tmp_path: Path) -> None:
    labels = torch.tensor([[1, 0], [1, 1]])
    found = exporting.Embedded({"cls": torch.zeros(2, 3)}, labels, ["a", "b"], ("x", "y"), (1, 1))
    for name, writer in exporting.WRITERS.items():
        writer(tmp_path / name, found)
    assert parquet.read_table(tmp_path / "parquet")["label"].to_pylist() == [[1, 0], [1, 1]]
    with np.load(tmp_path / "npz") as npz, safe_open(tmp_path / "safetensors", "np") as tensors:
        np.testing.assert_array_equal(npz["labels"], labels)
        np.testing.assert_array_equal(tensors.get_tensor("labels"), labels)
