import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from vitreg_core import VisionTransformer, ViTConfig, as_backbone, load_model
from vitreg_core.errors import InputError
from vitreg_eval import search, sweep
from vitreg_eval.config import LostOptions
from vitreg_eval.datasets.photos import PhotoFile, open_photos
from vitreg_eval.facets import Place, fill, read_places, smooth_outliers
from vitreg_eval.journal import Entry, Journal
from vitreg_eval.lost import discover
from vitreg_eval.metrics import corloc
from vitreg_eval.search import Item, Setting, settings_of
from vitreg_eval.tasks import lost

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, registers=2)
SIZES = [(40, 48), (33, 41), (48, 40), (40, 44), (47, 33), (24, 24), (40, 48)]
VOC_OBJECT = (
    "<object><name>dog</name><difficult>{}</difficult><truncated>{}</truncated>"
    "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(CONFIG).eval()


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture with blotches."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos of several sizes, some of which share a padded one."""
    (tmp_path / "photos").mkdir()
    for number, size in enumerate(SIZES):
        picture(number, size).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """VOC with eight images: the last has no objects, the one before only hard ones."""
    year = tmp_path / "VOCdevkit" / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (year / name).mkdir(parents=True)
    for number in range(8):
        height, width = SIZES[number % len(SIZES)]
        picture(number, (height, width)).save(year / "JPEGImages" / f"00000{number}.jpg")
        easy = VOC_OBJECT.format(0, 0, width - number, height // 2 + number)
        hard = VOC_OBJECT.format(1, 0, width, height) + VOC_OBJECT.format(0, 1, 3, 3)
        objects = "" if number == 7 else hard if number == 6 else easy + hard
        text = f"<annotation><filename>00000{number}.jpg</filename>{objects}</annotation>"
        (year / "Annotations" / f"00000{number}.xml").write_text(text)
    (year / "ImageSets/Main/trainval.txt").write_text("".join(f"00000{number}\n" for number in range(8)))
    return tmp_path


def voc_options(voc: Path, **changes: Any) -> LostOptions:  # noqa: ANN401
    return LostOptions(dataset="voc07", data=voc, center=True, **changes)


def boxes_of(out: Path) -> list[list[int]]:
    return [record["box"] for record in json.loads((out / "boxes.json").read_text())]


def run(model: VisionTransformer, options: LostOptions, out: Path) -> Any:  # noqa: ANN401
    out.mkdir(exist_ok=True)
    return lost.run(model, options, out)


# What is read


PLACES = [Place(-1, "values"), Place(0, "keys"), Place(1, "queries"), Place(2, "keys")]


class Derived(VisionTransformer):
    """Answers by the protocol alone."""


@pytest.mark.parametrize("kind", ["native", "derived", "timm"])
def test_features_of_all_places_come_from_one_pass(model: VisionTransformer, kind: str) -> None:
    images = torch.randn(2, 3, 40, 24)
    backbone: Any = model
    if kind == "derived":
        backbone = Derived(CONFIG).eval()
        backbone.load_state_dict(model.state_dict())
    if kind == "timm":
        theirs = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, dynamic_img_size=True, reg_tokens=2
        )
        backbone = as_backbone(theirs.eval())
    for place, read in zip(PLACES, read_places(backbone, images, PLACES, norms=True), strict=True):
        with torch.no_grad():
            heads = getattr(backbone.qkv(images, place.layer), place.facet)[:, :, 3:]
        expected = heads.transpose(1, 2).flatten(2)
        torch.testing.assert_close(read.features, expected)
        if place.layer != 0:
            stream = backbone.intermediate(images, [place.layer % 3 - 1], norm=False)[0].patches
            assert read.norms is not None
            torch.testing.assert_close(read.norms, stream.norm(dim=-1))


def test_no_block_runs_that_nobody_reads() -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3).eval()
    ran = []
    for number, block in enumerate(theirs.blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    read_places(as_backbone(theirs), torch.randn(1, 3, 32, 32), [Place(0, "keys"), Place(1, "values")])
    assert ran == [0]
    with torch.no_grad():
        theirs(torch.randn(1, 3, 32, 32))  # nothing is left behind
    assert ran == [0, 0, 1, 2]


def test_a_block_that_is_not_there_is_named(model: VisionTransformer) -> None:
    with pytest.raises(InputError, match="layer -4 of a model with 3 blocks"):
        read_places(model, torch.randn(1, 3, 32, 32), [Place(-4, "keys")])


def test_holes_take_the_mean_of_their_neighbours() -> None:
    features = torch.arange(24.0).reshape(12, 2)
    holes = torch.zeros(12, dtype=torch.bool)
    holes[[0, 5]] = True  # of a grid of 3 x 4: a corner, and a patch inside that touches it
    filled = fill(features, holes, (3, 4))
    assert torch.equal(filled[~holes], features[~holes])
    torch.testing.assert_close(filled[0], features[[1, 4]].mean(dim=0))
    torch.testing.assert_close(filled[5], features[[1, 2, 4, 6, 8, 9, 10]].mean(dim=0))
    far = torch.ones(12, dtype=torch.bool)
    far[3] = False  # rings are filled one after the other
    torch.testing.assert_close(fill(features, far, (3, 4)), features[3].expand(12, 2))


def test_smoothing_changes_outliers_alone() -> None:
    features, norms = torch.randn(48, 4), torch.rand(48) + 10
    assert torch.equal(smooth_outliers(features, norms, (6, 8)), features)
    norms[[7, 20]] = 300.0
    changed = (smooth_outliers(features, norms, (6, 8)) != features).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [7, 20]


# The search


def test_images_of_one_padded_size_share_a_pass_and_come_back_in_order(
    model: VisionTransformer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = LostOptions(images=folder, center=True)
    photos = list(open_photos(model.preprocess, options).photos)
    passes = []

    def spy(backbone: VisionTransformer, images: torch.Tensor, *rest: Any, **more: Any) -> Any:  # noqa: ANN401
        passes.append(tuple(images.shape))
        return read_places(backbone, images, *rest, **more)

    monkeypatch.setattr(search, "read_places", spy)
    found = lost.search(model, photos, options)
    assert sorted(passes) == sorted([(4, 3, 40, 48), (2, 3, 48, 40), (1, 3, 24, 24)])
    assert [find.name for find in found] == [f"{number}.png" for number in range(len(SIZES))]
    for photo, find in zip(photos, found, strict=True):
        pixels = model.preprocess.normalize(photo.pixels)
        height, width = pixels.shape[1:]
        rows, cols = -(-height // 8), -(-width // 8)
        padded = torch.zeros(1, 3, rows * 8, cols * 8)
        padded[0, :, :height, :width] = pixels
        with torch.no_grad():
            keys = model.qkv(padded, -1).keys[0, :, 3:].transpose(0, 1).flatten(1)
        expected = discover(keys, (rows, cols), 8, (height, width), center=True)
        assert find.discovery.box == expected.box
        assert torch.equal(find.discovery.mask, expected.mask)


def test_pictures_of_data_sets_are_read_as_stored_and_photos_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (24, 40)).save(tmp_path / "a.jpg", exif=exif)
    for upright, size in ((False, (24, 40)), (True, (40, 24))):
        photo = PhotoFile("a", tmp_path / "a.jpg", None, upright=upright)
        assert photo.size == tuple(photo.pixels.shape[1:]) == size


@pytest.mark.parametrize("method", ["lost", "tokencut", "dino-seg", "pca", "full", "center", "random"])
def test_every_method_gives_a_box_for_every_image(voc: Path, tmp_path: Path, method: Any) -> None:  # noqa: ANN401
    # dino_seg reads head 4, as published, so that the model needs five heads
    wide = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=40, depth=1, num_heads=5)).eval()
    outcome = run(wide, LostOptions(dataset="voc07", data=voc, method=method), tmp_path / "out")
    boxes = boxes_of(tmp_path / "out")
    assert len(boxes) == 8
    if method in {"full", "center", "random"}:
        name = {"full": "corloc_whole_image"}.get(method, f"corloc_{method}")
        assert outcome.metrics["corloc"] == outcome.metrics[name]


# The sweep


def test_a_sweep_gives_the_boxes_of_its_settings_one_by_one(model: VisionTransformer, folder: Path) -> None:
    swept = LostOptions(
        images=folder, normalize=True, sweep=True, layers=(-1, 0), facets=("keys", "values"), biases=(-0.2, 0.1)
    )
    settings = settings_of(swept)
    assert len(settings) == 9
    assert settings[0] == Setting(-1, "keys", 0.0)
    items = [Item(*pair) for pair in enumerate(open_photos(model.preprocess, swept).photos)]
    together = {one.item.number: [found.box for found in one.found] for one in search.search_items(model, items, swept)}
    for index, setting in enumerate(settings):
        alone = LostOptions(images=folder, normalize=True, **setting._asdict())
        found = lost.search(model, [item.photo for item in items], alone)
        assert [find.discovery.box for find in found] == [together[number][index] for number in range(len(items))]
    assert len({tuple(boxes) for boxes in together.values()}) > 1


def test_a_relative_bias_does_not_see_the_scale_of_the_features(model: VisionTransformer, folder: Path) -> None:
    def boxes() -> list[Any]:
        options = LostOptions(images=folder, center=True, relative_bias=True, bias=-0.3)
        return [f.discovery.box for f in lost.search(model, open_photos(model.preprocess, options).photos, options)]

    before = boxes()
    with torch.no_grad():
        model.block(2).attn.qkv.weight.mul_(4)
        model.block(2).attn.qkv.bias.mul_(4)
    assert boxes() == before


def test_choices_on_all_images_and_on_one_half_are_kept_apart(
    model: VisionTransformer, voc: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = run(model, voc_options(voc, sweep=True, layers=(-1, 0), biases=(-0.3, 0.0, 0.3)), out)
    content = json.loads((out / "sweep.json").read_text())
    assert len(content["curve"]) == 6
    values = [row["corloc"] for row in content["curve"]]
    assert outcome.metrics["corloc_oracle"].value == content["choices"]["oracle"]["value"] == max(values)
    assert "chosen on the images that it is reported on" in outcome.metrics["corloc_oracle"].note
    held_out = outcome.metrics["corloc_held_out"]
    first = sweep.first_half([f"00000{number}.jpg" for number in range(7)])
    assert held_out.n == int((~first).sum())
    assert 0 < held_out.n < 7
    with Image.open(out / "sweep.png") as drawn:
        assert drawn.width > 100


def test_the_held_out_number_is_not_of_the_images_that_chose() -> None:
    names = [f"{number}.jpg" for number in range(40)]
    first = sweep.first_half(names)
    assert 10 < int(first.sum()) < 30
    correct = torch.zeros(40, 3, dtype=torch.bool)
    correct[first, 1] = True  # best where one chooses, never right elsewhere
    correct[:, 2] = torch.arange(40) < 30
    metrics, chosen = sweep.chosen_metrics(names, correct, seed=0)
    assert chosen == {"oracle": 2, "held-out": 1}
    assert (metrics["corloc_oracle"].value, metrics["corloc_held_out"].value) == (0.75, 0.0)
    with pytest.raises(InputError, match="1 images are too few to choose settings on one half"):
        sweep.chosen_metrics(["a"], correct[:1], seed=0)


def test_many_boxes_are_judged_as_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 5):
        corner, side = torch.randint(0, 9, (2, 300 + count, 2), generator=generator)
        every = torch.cat([corner, corner + side], dim=1)
        boxes, true = every[:300], every[300:]
        assert torch.equal(sweep.meets(boxes, true), corloc(boxes, [true] * 300))


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("study", {"center": True, "normalize": True, "bias": 0.05, "sweep": False}),
        ("paper", {"center": False, "normalize": False, "sweep": True, "layers": (-1,)}),
        ("test-time-registers", {"center": False, "normalize": True, "sweep": True, "layers": (-1, -2, -3, -4)}),
    ],
)
def test_presets_are_what_their_authors_state(preset: Any, expected: dict[str, object]) -> None:  # noqa: ANN401
    options = LostOptions(preset=preset, features="values").resolved()
    assert options.model_dump(include=set(expected)) == expected
    assert options.features == "values"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"preset": "study", "bias": 0.1}, "--bias 0.1 with --preset study, which has 0.05"),
        ({"preset": "paper", "center": True}, "--center True with --preset paper, which has False"),
        ({"preset": "paper", "bias": -1.0}, "--bias -1.0 with --preset paper, which sweeps it"),
        ({"sweep": True, "method": "pca"}, "--sweep with --method pca: only lost has a bias"),
        ({"preset": "study", "method": "pca"}, "--method pca with --preset study, which has lost"),
        ({"preset": "study", "k_patches": 50}, "--k_patches 50 with --preset study, which has 100"),
        ({"method": "tokencut", "bias": 0.1}, "--bias 0.1 with --method tokencut: only lost has it"),
        ({"head": None}, "--head None with --method lost: only dino-seg has it"),
        ({"sweep": True, "images": "x"}, "--sweep with --images x: no true boxes to judge by"),
        ({"coco_list": "x"}, "--coco_list x with --dataset scenes"),
        ({"no_hard": True, "dataset": "coco"}, "--no_hard with --dataset coco; only VOC"),
        ({"images": "x", "dataset": "voc07"}, "--images x with --dataset voc07; give one of them"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        LostOptions(**options).needs()


# Data and results


def test_results_come_in_all_three_forms(model: VisionTransformer, voc: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = run(model, voc_options(voc), out)
    ours = json.loads((out / "boxes.json").read_text())
    theirs = pickle.loads((out / "preds.pkl").read_bytes())
    assert {name: box.tolist() for name, box in theirs.items()} == {one["image"]: one["box"] for one in ours}
    assert {(type(box), box.dtype) for box in theirs.values()} == {(np.ndarray, np.dtype("int64"))}
    assert b"numpy._core" not in (out / "preds.pkl").read_bytes()  # which NumPy 1 cannot find
    for record, coco in zip(ours, json.loads((out / "boxes_coco.json").read_text()), strict=True):
        x0, y0, x1, y1 = record["box"]
        assert coco["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        assert (coco["image_id"], coco["category_id"], coco["score"]) == (int(record["image"][:6]), 1, 1.0)
    assert ours[7]["correct"] is None
    assert outcome.metrics["corloc"].n == 7
    assert outcome.metrics["corloc"].value == np.mean([record["correct"] for record in ours[:7]])
    assert "1 images without true boxes are left out of CorLoc: 000007.jpg" in outcome.notes
    assert any("8 images: a subset of voc07 trainval, which has 5011" in note for note in outcome.notes)
    for name in ("boxes.png", "steps.png"):
        with Image.open(out / name) as drawn:
            assert drawn.width > 100


def test_thresholds_of_other_methods_are_options(model: VisionTransformer, voc: Path, tmp_path: Path) -> None:
    options = LostOptions(dataset="voc07", data=voc, method="dino-seg")
    with pytest.raises(InputError, match="head 4 of an attention layer with 3 heads; use 0 to 2, or none"):
        run(model, options, tmp_path / "out")
    for changes in ({"head": None}, {"head": 2, "mass": 0.99}, {"method": "tokencut", "tau": 1.0}):
        (tmp_path / "out" / "journal-0.jsonl").unlink(missing_ok=True)
        outcome = run(model, options.model_copy(update=changes), tmp_path / "out")
        failed = any("8 searches failed" in note for note in outcome.notes)
        assert failed == (changes.get("tau") == 1.0)  # no two patches are joined
        large = outcome.metrics["full_image_share"].value
        assert large == 1.0 if changes.get("mass") == 0.99 or failed else large < 1.0


def test_images_of_other_names_are_numbered(model: VisionTransformer, voc: Path) -> None:
    def numbers() -> list[int]:
        return [photo.image_id for photo in open_photos(model.preprocess, voc_options(voc)).photos]

    assert numbers() == list(range(8))
    year = voc / "VOCdevkit" / "VOC2007"
    for suffix, name in (("xml", "Annotations"), ("jpg", "JPEGImages")):
        (year / name / f"000005.{suffix}").rename(year / name / f"dog-5.{suffix}")
    listing = year / "ImageSets/Main/trainval.txt"
    listing.write_text(listing.read_text().replace("000005", "dog-5"))
    assert numbers() == list(range(1, 9))


def test_a_sweep_without_any_true_box_is_refused_before_the_search(
    model: VisionTransformer, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost, "search_items", None)
    for path in (voc / "VOCdevkit/VOC2007/Annotations").iterdir():
        path.write_text("<annotation/>")
    with pytest.raises(InputError, match="--sweep on 8 images of voc07 trainval, none of which has a true box"):
        run(model, LostOptions(dataset="voc07", data=voc, sweep=True), tmp_path / "out")


def test_hard_boxes_may_be_left_out_with_the_images_that_have_no_others(
    model: VisionTransformer, voc: Path, tmp_path: Path
) -> None:
    photos = list(open_photos(model.preprocess, voc_options(voc, no_hard=True)).photos)
    assert [len(photo.boxes) for photo in photos if photo.boxes is not None] == [1] * 6
    outcome = run(model, voc_options(voc, no_hard=True), tmp_path / "out")
    assert (outcome.data.n, outcome.metrics["corloc"].n) == (6, 6)
    assert "--no_hard left out 14 boxes, and 2 of 8 images with them" in outcome.notes


def test_photos_without_boxes_give_boxes_and_no_corloc(model: VisionTransformer, folder: Path, tmp_path: Path) -> None:
    outcome = run(model, LostOptions(images=folder), tmp_path / "out")
    assert not any(name.startswith("corloc") for name in outcome.metrics)
    assert len(boxes_of(tmp_path / "out")) == len(SIZES)


def test_a_search_that_fails_is_a_miss_and_is_listed(model: VisionTransformer, voc: Path, tmp_path: Path) -> None:
    outcome = run(model, LostOptions(dataset="voc07", data=voc, normalize=True, bias=-2.0), tmp_path / "out")
    assert (outcome.metrics["corloc"].value, outcome.metrics["corloc"].n) == (0.0, 7)
    assert outcome.metrics["corloc_whole_image"].value > 0
    assert any(note.startswith("8 searches failed and count as misses") for note in outcome.notes)
    assert boxes_of(tmp_path / "out")[0] == [0, 0, 48, 40]


def test_features_that_are_no_numbers_name_the_image(model: VisionTransformer, folder: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        model.block(2).attn.qkv.weight[30, 0] = float("nan")
    with pytest.raises(InputError, match=r"\.png: features of .* patches are not finite .* run the model in fp32"):
        run(model, LostOptions(images=folder), tmp_path / "out")


def test_bad_images_are_named(model: VisionTransformer, folder: Path, tmp_path: Path) -> None:
    picture(0, (5, 40)).save(folder / "flat.png")
    with pytest.raises(InputError, match=r"flat\.png: 5x40 pixels are less than one patch of 8; remove it"):
        run(model, LostOptions(images=folder), tmp_path / "out")
    (folder / "flat.png").write_bytes((folder / "0.png").read_bytes()[:300])
    with pytest.raises(InputError, match=r"flat\.png: not a readable image .*; replace or remove it"):
        run(model, LostOptions(images=folder), tmp_path / "other")


def test_a_model_without_class_token_has_no_dino_seg(folder: Path, tmp_path: Path) -> None:
    bare = VisionTransformer(CONFIG.model_copy(update={"class_token": False, "pool": "avg"})).eval()
    with pytest.raises(InputError, match="dino-seg needs the class token's attention, and this model has none"):
        run(bare, LostOptions(images=folder, method="dino-seg"), tmp_path / "out")


def test_a_model_without_the_facet_says_so(folder: Path, tmp_path: Path) -> None:
    class OtherAttention(nn.Module):
        num_heads = 3

        def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
            return x

    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, dynamic_img_size=True)
    theirs.blocks[0].attn = OtherAttention()
    backbone: Any = as_backbone(theirs.eval())
    with pytest.raises(InputError, match="OtherAttention"):
        run(backbone, LostOptions(images=folder), tmp_path / "out")


# The journal


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a search die when it has written down so many images."""
    add, written = Journal.add, []

    def dying(journal: Journal, entry: Entry) -> None:
        if len(written) == count:
            raise KeyboardInterrupt
        add(journal, entry)
        written.append(entry)

    monkeypatch.setattr(Journal, "add", dying)


def test_a_search_that_was_killed_goes_on_where_it_was(
    model: VisionTransformer, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = voc_options(voc)
    expected = run(model, options, tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("journal*"))
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        with pytest.raises(KeyboardInterrupt):
            run(model, options, tmp_path / "out")
    journal = tmp_path / "out" / "journal-0.jsonl"
    with journal.open("a") as file:
        file.write('{"number": 5, "si')  # a torn line
    searched: list[int] = []

    def spy(backbone: VisionTransformer, items: Iterator[Item], options: LostOptions) -> Iterator[Any]:
        for one in search.search_items(backbone, items, options):
            searched.append(one.item.number)
            yield one

    monkeypatch.setattr(lost, "search_items", spy)
    outcome = run(model, options, tmp_path / "out")
    assert len(searched) == 5
    assert outcome.metrics == expected.metrics
    assert boxes_of(tmp_path / "out") == boxes_of(tmp_path / "whole")
    assert not journal.exists()


def test_the_journal_of_another_search_is_refused(
    model: VisionTransformer, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            run(model, voc_options(voc), tmp_path / "out")
    with pytest.raises(InputError, match=r"journal-0\.jsonl holds 2 images of an unfinished search with another model"):
        run(model, voc_options(voc, features="values"), tmp_path / "out")
    run(model, voc_options(voc, batch_size=1), tmp_path / "out")  # what changes no box is no other search


@pytest.mark.real_data
def test_the_sample_of_coco_is_searched(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path / "cache"))
    options = LostOptions(dataset="coco", data=shared_data / "coco", split="val2017", method="full")
    outcome = run(load_model("vit_ti16"), options, tmp_path / "out")
    assert outcome.data.n == 79
    assert outcome.metrics["corloc"] == outcome.metrics["corloc_whole_image"]
