"""Batches of crops: where pictures lie, which a step takes, and that seed, step and share decide every pixel."""

import io
import os
import random
import tarfile
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_recipes import find
from vitreg_recipes.data import Share
from vitreg_recipes.dinov2.config import DinoConfig
from vitreg_recipes.dinov2.crops import Crops, MultiCrop
from vitreg_recipes.dinov2.data import CropData
from vitreg_recipes.dinov2.pictures import open_pictures

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
ALONE = Share(4, 0, 1)


def config_of(path: object, **changes: object) -> DinoConfig:
    config = find("dinov2_scenes")
    assert isinstance(config, DinoConfig)
    small = {
        "data.path": str(path),
        "data.batch_size": 4,
        "data.workers": 0,
        "data.local_crops": 3,
        "data.local_size": 8,
        "model.image_size": 32,
        "loss.koleo": 0.0,
    }
    return override(config, small | {name.replace("__", "."): value for name, value in changes.items()})


def batches(config: DinoConfig, count: int, step: int = 0, share: Share = ALONE) -> list[Crops]:
    return list(islice(CropData(config).batches(step, share, CPU), count))


def equal(one: Crops, other: Crops) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def encoded(number: int, size: tuple[int, int] = (48, 40), kind: str = "PNG") -> bytes:
    """A picture of one colour, by which it is known."""
    file = io.BytesIO()
    Image.new("RGB", size, (20 * number, 255 - 20 * number, 128)).save(file, kind)
    return file.getvalue()


def put(path: Path, number: int, **how: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number, **how))


def number_of(image: Image.Image) -> int:
    return round(image.getpixel((0, 0))[0] / 20)


def flat(root: Path) -> str:
    for number in range(6):
        put(root / "flat" / f"{number}.png", number)
    return str(root / "flat")


def nested(root: Path) -> str:
    for number in range(6):
        put(
            root / "nested" / ("train" if number < 5 else "val") / f"class{number % 2}" / "deep" / f"{number}.png",
            number,
        )
    return str(root / "nested")


def tar(file: Path, names: dict[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, data in names.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def tars(root: Path) -> str:
    """Shards, one with labels and one without."""
    tar(root / "tars" / "a.tar", {f"{n}.png": encoded(n) for n in range(3)} | {"0.cls": b"1", "notes.txt": b"none"})
    tar(root / "tars" / "b.tar", {f"sub/{n}.png": encoded(n) for n in range(3, 6)})
    return str(root / "tars" / "*.tar")


def folder_of_tars(root: Path) -> str:
    tars(root)
    return str(root / "tars")


def parquet(root: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_dict({"image": [{"bytes": encoded(n), "path": None} for n in range(6)]})
        (root / "rows").mkdir()
        rows.cast_column("image", datasets.Image()).to_parquet(root / "rows" / "0.parquet")
    return str(root / "rows" / "*.parquet")


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path / "cache"))


@pytest.mark.filterwarnings("ignore")  # of datasets
@pytest.mark.parametrize(("make", "count"), [(flat, 6), (nested, 5), (tars, 6), (folder_of_tars, 6), (parquet, 6)])
def test_pictures_need_no_labels(tmp_path: Path, make: Callable[[Path], str], count: int) -> None:
    path = make(tmp_path)
    for _ in range(2):  # the second time from the index of the tars
        found = open_pictures(path)
        assert len(found) == count
        assert sorted(number_of(found.read(index)) for index in range(count)) == list(range(count))
        assert all(Path(found.name(index)).name for index in range(count))
    config = config_of(path)
    assert equal(batches(config, 3)[2], batches(config, 1, step=2)[0])


def test_crops_come_crop_by_crop(tmp_path: Path) -> None:
    config = config_of(flat(tmp_path))
    (batch,) = batches(config, 1)
    assert batch.global_crops.shape == (8, 3, 32, 32)
    assert batch.local_crops.shape == (12, 3, 8, 8)
    assert batches(override(config, {"data.local_crops": 0}), 1)[0].local_crops.shape == (0, 3, 8, 8)
    data = CropData(config)

    class Known(MultiCrop):
        def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
            large, small = (torch.full((crops, 3, 1, 1), float(number_of(image))) for crops in (2, 3))
            return large, small

    data.crop = Known(config.data, data.preprocess)
    batch = next(data.batches(0, ALONE, CPU))
    one = batch.global_crops[:4, 0, 0, 0].tolist()
    assert len(set(one)) == 4
    assert batch.global_crops[:, 0, 0, 0].tolist() == one * 2
    assert batch.local_crops[:, 0, 0, 0].tolist() == one * 3


@pytest.mark.parametrize("source", ["scenes", "folder"])
def test_a_batch_follows_from_seed_step_and_process(tmp_path: Path, source: str) -> None:
    config = config_of("scenes" if source == "scenes" else flat(tmp_path))
    first, second, third = batches(config, 3)
    torch.manual_seed(5)
    random.seed(5)
    assert equal(batches(config, 1, step=2)[0], third)
    assert not torch.equal(first.global_crops, second.global_crops)
    other = batches(override(config, {"seed": 1}), 1)[0]
    assert not torch.equal(other.global_crops, first.global_crops)
    halves = [batches(config, 1, share=Share(2, process, 2))[0] for process in (0, 1)]
    assert not torch.equal(halves[0].global_crops, halves[1].global_crops)
    assert not torch.equal(
        batches(config, 1, share=Share(16, 0, 2))[0].masks, batches(config, 1, share=Share(16, 1, 2))[0].masks
    )
    if source == "folder":  # two processes share the pictures of one batch
        joined = torch.cat([half.global_crops.unflatten(0, (2, 2)) for half in halves], dim=1)
        assert torch.equal(joined.flatten(0, 1), first.global_crops)


def test_reading_leaves_the_generators_of_the_training_alone() -> None:
    data = CropData(config_of("scenes")).batches(0, ALONE, CPU)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    next(data)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    config = config_of(flat(tmp_path))
    ours = batches(override(config, {"data.workers": workers}), 3)
    assert all(equal(*pair) for pair in zip(ours, batches(config, 3), strict=True))


def test_half_of_the_global_crops_are_masked() -> None:
    config = config_of("scenes", data__batch_size=16)
    masks = [batch.masks for batch in batches(config, 3, share=Share(16, 0, 1))]
    for mask in masks:
        assert mask.shape == (32, 16)
        assert mask.any(dim=1).sum() <= 16
    assert not torch.equal(masks[0], masks[1])
    distilled = override(config, {"teacher.source": "somewhere"})
    assert batches(distilled, 1)[0].masks.all()
    assert not batches(override(config, {"loss.ibot": 0.0}), 1)[0].masks.any()


def test_unreadable_pictures_are_named_once_and_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(flat(tmp_path))
    (path / "2.png").write_bytes(b"no picture")
    data = CropData(config_of(path))
    list(islice(data.batches(0, ALONE, CPU), 4))
    told = capsys.readouterr().err
    assert told.count(f"{path / '2.png'}: not a readable image, the next one takes its place") == 1
    assert data.skipped == {str(path / "2.png")}
    for number in (0, 1, 3):
        (path / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"4 of 6 images cannot be read, such as .*; mend or remove them"):
        list(islice(CropData(config_of(path)).batches(0, ALONE, CPU), 4))


def test_small_pictures_are_enlarged_and_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        put(tmp_path / "small" / f"{number}.png", number, size=(31, 40) if number < 3 else (32, 32))
    found = list(islice(CropData(config_of(tmp_path / "small")).batches(0, ALONE, CPU), 3))
    told = capsys.readouterr().err
    assert told.count("3 of 4 images in a batch are smaller than the global crops (32 px) and are enlarged") == 1
    assert told.count("enlarged") == 1
    assert found[0].global_crops.shape == (8, 3, 32, 32)
    batches(config_of(flat(tmp_path)), 1)
    assert "enlarged" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("flat", "6 images for data.batch_size=8; give a smaller batch, or more images"),
        ("empty", "0 images found; it must hold files such as"),
        ("missing", "data.path=.*: no such folder; give scenes, a folder of images, hub:org/name, or shards"),
        ("none/*.tar", "0 files found; in a pattern"),
        ("bad.tar", "0 images found; it must hold files such as"),
    ],
)
def test_data_that_cannot_be_used_are_refused(tmp_path: Path, path: str, message: str) -> None:
    flat(tmp_path)
    (tmp_path / "empty").mkdir()
    tar(tmp_path / "bad.tar", {"a.txt": b"words"})
    with pytest.raises(InputError, match=message) as raised:
        CropData(config_of(tmp_path / path, data__batch_size=8))
    assert "\n" not in str(raised.value)


@pytest.mark.real_data
def test_photos_give_crops() -> None:
    shared = Path(os.environ.get("VITREG_SHARED", ROOT.parent / "shared"))
    config = config_of(shared / "data" / "imagenette-224", model__image_size=64, data__local_size=32)
    data = CropData(config)
    assert data.images == 1100
    batch = next(data.batches(0, ALONE, CPU))
    assert batch.global_crops.isfinite().all()
    assert batch.global_crops.std() > 0.3
