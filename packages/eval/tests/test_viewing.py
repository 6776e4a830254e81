import io
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vitreg_core import create_model
from vitreg_core.data.images import read_image
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError
from vitreg_core.outliers import find_outliers
from vitreg_core.planted import plant_register_neurons
from vitreg_core.test_time import Neuron, with_test_time_registers
from vitreg_core.vit import VisionTransformer
from vitreg_eval import viewing, viewing_maps, viewing_pictures
from vitreg_eval.lru import Cache
from vitreg_eval.viewing import Choice, Viewer
from vitreg_eval.viewing_page import Scale, Shown, clickable, maps_page, painted
from vitreg_eval.viewing_pictures import Pictures

CHOICE = Choice(layer=11, head=None, token="cls", patch=(0.5, 0.5))


def tiny(registers: int = 0, **changes: object) -> VisionTransformer:
    torch.manual_seed(registers)
    name = f"vit_ti16_reg{registers}" if registers else "vit_ti16"
    return create_model(name, **{"image_size": 64, "layer_scale": None, **changes}).eval()


@pytest.fixture(scope="module")
def viewer() -> Viewer:
    return Viewer([tiny(), tiny(2, depth=3, patch_size=8)])


@dataclass
class Blob:
    nbytes: int


def test_the_cache_drops_what_was_not_asked_for_longest() -> None:
    cache: Cache[Blob] = Cache(10)
    for name in "abc":
        cache.put(name, Blob(3))
    assert cache.get("a") is not None
    cache.put("d", Blob(4))
    assert [cache.get(name) is not None for name in "abcd"] == [True, False, True, True]
    cache.put("a", Blob(1))
    cache.put("huge", Blob(11))
    assert cache.get("huge") is None
    assert cache.nbytes == sum(blob.nbytes for blob in cache.values.values()) == 8


@pytest.mark.parametrize("layer", [0, 5, 11])
@pytest.mark.parametrize(("head", "token"), [(None, "cls"), (2, "cls"), (1, "patch"), (None, "patch")])
def test_attention_is_that_of_the_model(viewer: Viewer, layer: int, head: int | None, token: str) -> None:
    choice = Choice(layer, head, token, (0.3, 0.9))
    [shown, _] = viewer.view("scene 1", choice)
    model = viewer.models[0]
    weights = model.attention(viewer.pictures.open("scene 1").inputs[0][None], layer)[0].detach()
    row, col = 1, 3  # of 4 x 4 patches
    assert shown.patch == (row, col)
    query = 0 if token == "cls" else 1 + 4 * row + col
    wanted = (weights.mean(0) if head is None else weights[head])[query, 1:]
    np.testing.assert_allclose(shown.attention, (wanted / wanted.sum()).reshape(4, 4), rtol=1e-4)


def test_registers_look_where_they_do(viewer: Viewer) -> None:
    lacking, shown = viewer.view("scene 0", CHOICE._replace(token="register 1"))
    assert lacking.attention is None
    assert lacking.missing == "no register 1: this model has 0 registers"
    image = viewer.pictures.open("scene 0").inputs[1][None]
    wanted = viewer.models[1].attention(image, 2)[0].detach().mean(0)[2, 3:]
    np.testing.assert_allclose(shown.attention.ravel(), wanted / wanted.sum(), rtol=1e-4)
    assert shown.layer == 2  # the last block of a model of three


def test_a_head_that_is_not_there_is_said(viewer: Viewer) -> None:
    assert "no head 3: this model has 3" in viewer.view("scene 0", CHOICE._replace(head=3))[0].missing


def test_norms_similarity_and_outliers_are_those_of_the_tokens(viewer: Viewer) -> None:
    [shown, _] = viewer.view("scene 2", CHOICE._replace(layer=4, patch=(0.0, 0.99)))
    image = viewer.pictures.open("scene 2").inputs[0][None]
    with torch.no_grad():
        [features] = viewer.models[0].intermediate(image, [4], norm=False)
    tokens = features.patches[0].double().numpy()
    lengths = np.sqrt((tokens**2).sum(axis=1))
    np.testing.assert_allclose(shown.maps.norms.ravel(), lengths, rtol=1e-4)
    np.testing.assert_allclose(shown.similarity.ravel(), tokens @ tokens[3] / lengths / lengths[3], atol=1e-4)
    alone = find_outliers(torch.from_numpy(lengths)[None])
    assert (shown.maps.outliers.ravel() == alone.mask[0].numpy()).all()


def test_components_span_what_scikit_learn_finds(viewer: Viewer) -> None:
    from sklearn.decomposition import PCA

    [_, shown] = viewer.view("scene 2", CHOICE)
    image = viewer.pictures.open("scene 2").inputs[1][None]
    with torch.no_grad():
        tokens = viewer.models[1].intermediate(image, [2], norm=False)[0].patches[0].numpy()
    along = PCA(3).fit_transform(tokens)
    for mine, theirs in zip(shown.maps.components.reshape(-1, 3).T, along.T, strict=True):
        inside = (mine > 0) & (mine < 1)
        assert abs(np.corrcoef(mine[inside], theirs[inside])[0, 1]) > 0.999


def test_lost_finds_the_object_that_was_put_there() -> None:
    rng = np.random.default_rng(0)
    keys = np.tile(rng.normal(size=16), (64, 1)) + 0.1 * rng.normal(size=(64, 16))
    grid = keys.reshape(8, 8, 16)
    grid[2:5, 3:6] = rng.normal(size=16) * 2
    grid += 5  # all are similar until the mean is subtracted
    steps = viewing_maps.find_object(torch.from_numpy(keys).float(), (8, 8), 8, np.zeros((64, 64, 3), np.float32))
    wanted = np.zeros((8, 8), dtype=bool)
    wanted[2:5, 3:6] = True
    assert (steps.component == wanted).all()
    assert steps.box == (24, 16, 48, 40)
    assert wanted[steps.seed]
    assert ((steps.similarity > 0) == wanted).all()
    assert (steps.voters & ~wanted).sum() == 0


def test_a_view_is_computed_once(viewer: Viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    viewer.view("scene 3", CHOICE)

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(viewing, "look_into", never)
    before = viewer.view("scene 3", CHOICE._replace(head=1, patch=(0.1, 0.1)))
    again = viewer.view("scene 3", CHOICE._replace(layer=1, head=1))  # another block came with the same pass
    assert before[0].layer == 11
    assert again[0].layer == 1


def test_many_threads_at_once_see_their_own_picture(viewer: Viewer) -> None:
    fresh = Viewer(viewer.models)
    keys = [f"scene {number % 8}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda key: fresh.view(key, CHOICE), keys))
    for key, views in zip(keys, found, strict=True):
        for mine, alone in zip(views, viewer.view(key, CHOICE), strict=True):
            np.testing.assert_array_equal(mine.maps.norms, alone.maps.norms)


def test_memory_stays_bounded() -> None:
    small = Viewer([tiny()], most=2**21)
    for key in small.pictures.names:
        small.view(key, CHOICE)
    assert 0 < small.looks.nbytes <= 2**21


def test_a_large_model_keeps_the_chosen_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewing_maps, "WHOLE_PASS_BYTES", 0)
    small, all_blocks = Viewer([tiny()]), Viewer([tiny()])
    [one] = small.view("scene 0", CHOICE)
    assert len(small.looks.values) == 1
    monkeypatch.undo()
    [other] = all_blocks.view("scene 0", CHOICE)
    assert len(all_blocks.looks.values) == 12
    np.testing.assert_allclose(one.attention, other.attention, rtol=1e-5)


@torch.no_grad()
def even(depth: int) -> VisionTransformer:
    """A random model whose patch norms are even, as those of trained models are."""
    torch.manual_seed(0)
    model = create_model("vit_ti8", image_size=64, depth=depth, embed_dim=96, layer_scale=0.1).eval()
    model.positions.patches.mul_(20)
    return model


def test_test_time_registers_take_the_planted_artifact_away() -> None:
    model = even(4)
    images = model.preprocess.normalize(draw_scenes(96, 3, image_size=64).image)
    planted, _ = plant_register_neurons(model, images, layer=2)
    seen = Viewer([planted])
    assert [seen.registers(test_time=False), seen.registers(test_time=True) > 0] == [0, True]
    assert ": outliers" in seen.find_mended()[0].result().verdict
    plain, mended = (
        [seen.view(key, CHOICE._replace(test_time=on))[0].maps.norms for key in seen.pictures.names]
        for on in (False, True)
    )
    assert max(norms.max() / np.median(norms) for norms in plain) > 8
    assert max(norms.max() / np.median(norms) for norms in mended) < 2
    [view] = seen.view("scene 0", CHOICE._replace(test_time=True, token="register 0"))
    assert view.attention is not None


def test_a_model_without_outliers_stays_as_it_is() -> None:
    seen = Viewer([even(2)])
    assert seen.model(0, test_time=True) is seen.models[0]
    assert "nothing to move" in seen.find_mended()[0].result().verdict


def test_a_model_that_cannot_be_mended_says_why() -> None:
    seen = Viewer([even(1)])
    seen.models = (with_test_time_registers(seen.models[0], [Neuron(0, 1)]),)
    assert "moved neurons already" in seen.find_mended()[0].result().verdict
    assert seen.view("scene 0", CHOICE._replace(test_time=True))[0].maps.norms.shape == (8, 8)


def test_two_models_need_two_sources() -> None:
    with pytest.raises(InputError, match="given twice"):
        viewing.short_names(["a/b", "a/b"])
    assert viewing.short_names(["a/b", "c/d"]) == ["b", "d"]
    assert viewing.short_names(["a/b", "c/b"]) == ["a/b", "c/b"]


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (60, 40), **options: object) -> Path:
    Image.effect_noise(size, 60).convert("RGB").convert(mode).save(path, **options)
    return path


ODD: dict[str, Callable[[Path], Path]] = {
    "1 x 1": lambda folder: save(folder / "one.png", size=(1, 1)),
    "alpha": lambda folder: save(folder / "alpha.png", "RGBA"),
    "CMYK": lambda folder: save(folder / "cmyk.jpg", "CMYK"),
    "16 bits": lambda folder: save(folder / "deep.png", "I;16"),
    "one bit": lambda folder: save(folder / "bit.png", "1"),
    "very long": lambda folder: save(folder / "long.png", size=(5000, 1)),
    "a wrong name": lambda folder: save(folder / "jpeg.png", format="JPEG"),
    "a palette": lambda folder: save(folder / "palette.gif", "P"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_uploads_work(kind: str, viewer: Viewer, tmp_path: Path) -> None:
    path = ODD[kind](tmp_path)
    picture = viewer.pictures.add(path)
    assert picture.name == path.name
    torch.testing.assert_close(picture.inputs[0], viewer.models[0].preprocess(read_image(path)))
    assert np.isfinite(viewer.view(picture.key, CHOICE)[0].maps.norms).all()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than it has."""
    parts = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), b"IDAT" + zlib.compress(b"\0"))
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


BAD = {
    "text.jpg": (b"not a picture at all", "text.jpg: not a readable image"),
    "bomb.png": (png_of_size(20_000, 20_000), "bomb.png: far too many pixels; give a photo of at most 50 megapixels"),
    "large.png": (png_of_size(10_000, 8_000), "large.png: 10,000 x 8,000 pixels; give a photo of at most 50"),
    "empty.png": (b"", "empty.png: not a readable image"),
    "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "page.eps: not a readable image"),
    "cut.png": (png_of_size(50, 50), "cut.png: not a readable image"),
    "heavy.jpg": (b"x" * (20 * 2**20 + 1), "heavy.jpg: 20 MB; give a photo of at most 20 MB"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_uploads_are_refused_in_one_line(name: str, viewer: Viewer, tmp_path: Path) -> None:
    data, words = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        viewer.pictures.add(tmp_path / name)
    assert words in str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, format="PNG")  # a few kilobytes
    (tmp_path / "bomb.png").write_bytes(file.getvalue())
    monkeypatch.setattr(viewing_pictures, "decode_image", None)
    with pytest.raises(InputError, match="9,000 x 9,000 pixels"):
        Pictures([tiny().preprocess]).add(tmp_path / "bomb.png")


def test_only_listed_pictures_open(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    save(tmp_path / "in" / "deep" / "a.png")
    save(tmp_path / "out.png")
    pictures = Pictures([tiny().preprocess], tmp_path / "in")
    assert pictures.names["file 0"] == "deep/a.png"
    assert pictures.open("file 0").name == "deep/a.png"
    for key in ("../out.png", "file 1", str(tmp_path / "out.png"), "upload 00"):
        with pytest.raises(InputError, match="no longer in memory"):
            pictures.open(key)


def test_register_neurons_are_sought_on_the_folder_where_it_is_large_enough(tmp_path: Path) -> None:
    preprocess = tiny().preprocess
    for number in range(10):
        save(tmp_path / f"{number}.png")
    (tmp_path / "a.jpg").write_text("broken")
    pictures = Pictures([preprocess], tmp_path)
    assert pictures.calibration(0, 16).shape == (10, 3, 64, 64)
    torch.testing.assert_close(pictures.calibration(0, 16)[0], preprocess(read_image(tmp_path / "0.png")))
    assert len(pictures.calibration(0, 64)) == 64  # drawn scenes


def test_colours_are_those_of_the_scale() -> None:
    painted_map = Scale("gray", 1.0, 3.0).paint(np.array([[0.0, 1.0], [2.0, 9.0]]))
    assert painted_map[..., 0].tolist() == [[0, 0], [128, 255]]
    large = painted(painted_map)
    assert large.shape == (256, 256, 3)
    assert (large[:128, :128] == 0).all()
    assert (large[128:, 128:] == 255).all()


def test_the_page_marks_outliers_and_names_no_other_host(viewer: Viewer) -> None:
    views = viewer.view("scene 0", CHOICE)
    page = maps_page(Shown(views, views, CHOICE))
    assert page.count("<img") == 4 * 2 + 2 * 5
    assert "http" not in page
    assert page.count("<section") == 5


def test_names_cannot_smuggle_markup_into_the_page(viewer: Viewer) -> None:
    evil = Viewer([tiny()])
    evil.names = ["<script>alert(1)</script>"]
    views = evil.view("scene 0", CHOICE)
    assert "<script" not in maps_page(Shown(views, views, CHOICE))


def test_the_clicked_patch_is_framed(viewer: Viewer) -> None:
    [view, _] = viewer.view("scene 0", CHOICE._replace(patch=(0.0, 0.99)))
    picture = clickable(np.zeros((64, 64, 3), dtype=np.float32), view)
    assert picture.shape == (448, 448, 3)
    yellow = np.argwhere(picture[..., 0] > 200)
    assert yellow.min(axis=0).tolist() == [0, 336]
    assert yellow.max(axis=0).tolist() == [111, 447]
