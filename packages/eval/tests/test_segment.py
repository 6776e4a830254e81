import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score
from torch import Tensor
from torch.nn import functional as F
from vitreg_core import VisionTransformer, ViTConfig, load_model
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import Preprocess
from vitreg_core.errors import InputError
from vitreg_eval.analyses.segments import Segmented, most_frequent, palette, plot_segments
from vitreg_eval.config import SegmentOptions
from vitreg_eval.datasets.masks import MaskSet, mask_pairs
from vitreg_eval.dense import HeadSchedule, train_head
from vitreg_eval.metrics import class_areas, confusion_matrix
from vitreg_eval.segment_head import (
    HeadRecord,
    SegmentHead,
    initial_head,
    load_head,
    save_head,
    segment_loss,
    segment_schedule,
)
from vitreg_eval.segment_train import sampled
from vitreg_eval.segment_views import change_colours, fixed_view, is_varied, train_view, whole_view
from vitreg_eval.sliding import Segmenter, enlarged_argmax, starts, windows
from vitreg_eval.tasks import segment

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, registers=2)
PLAIN = Preprocess(PreprocessConfig(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(CONFIG).eval()


def write_data(root: Path, counts: tuple[int, int] = (6, 4)) -> Path:
    """Pictures of two coloured halves: the class of a pixel is its colour."""
    colours = np.array([(220, 30, 30), (30, 220, 30), (30, 30, 220)], dtype=np.uint8)
    random = np.random.default_rng(0)
    for split, count in zip(("train", "val"), counts, strict=True):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            first, second = random.permutation(3)[:2]
            mask = np.full((40, 52 + 4 * index), first, dtype=np.uint8)
            mask[:, mask.shape[1] // 2 :] = second
            Image.fromarray(colours[mask]).save(root / "images" / split / f"{index}.png")
            Image.fromarray(mask + 1).save(root / "annotations" / split / f"{index}.png")
    return root


# The head


def test_a_new_head_is_that_of_dinov2() -> None:
    head = initial_head(64, 50, seed=0)
    assert head.conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert head.conv.bias is not None
    assert head.conv.bias.abs().sum() == 0
    assert (head.norm.eps, head.norm.momentum, head.dropout.p) == (1e-5, 0.1, 0.1)
    assert torch.equal(head.conv.weight, initial_head(64, 50, seed=0).conv.weight)
    assert not torch.equal(head.conv.weight, initial_head(64, 50, seed=1).conv.weight)


def test_a_head_normalises_channels_then_weighs_them() -> None:
    head = initial_head(3, 2, seed=0).eval()
    with torch.no_grad():
        head.norm.running_mean.copy_(torch.tensor([1.0, 2, 3]))
        head.norm.running_var.copy_(torch.tensor([4.0, 1, 9]))
        head.norm.weight.copy_(torch.tensor([1.0, 2, 3]))
        head.norm.bias.copy_(torch.tensor([0.5, 0, 0]))
        head.conv.weight.copy_(torch.tensor([[1.0, 10, 100], [0, 0, 1]])[..., None, None])
        head.conv.bias.copy_(torch.tensor([0.0, 7]))
        found = head(torch.tensor([3.0, 4, 6])[None, :, None, None])
    assert found.flatten().tolist() == pytest.approx([1.5 + 10 * 4 + 100 * 3, 3 + 7], rel=1e-4)


def test_whole_channels_are_dropped_while_training_only() -> None:
    head = SegmentHead(200, 2)
    dropped = head.dropout(torch.ones(8, 200, 3, 3))
    zeros = dropped.eq(0)
    assert torch.equal(zeros.all(dim=(2, 3)), zeros.any(dim=(2, 3)))
    assert zeros.float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert torch.equal(head.eval().dropout(torch.ones(1, 200, 1, 1)), torch.ones(1, 200, 1, 1))


def test_the_learning_rate_rises_then_falls_as_published() -> None:
    lr = segment_schedule(40_000).lr
    assert lr(0) == lr(1) == pytest.approx(1e-9, rel=1e-6)  # the scheduler skips the first step
    assert lr(751) == pytest.approx(1e-3 * (1 - 0.5 * (1 - 1e-6)) * (1 - 750 / 40_000))
    assert lr(1501) == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 1501 / 40_000)))
    assert lr(39_999) == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 39_999 / 40_000)))
    assert [segment_schedule(1).lr(0), segment_schedule(2).lr(1)] == pytest.approx([0, 5e-4])


def test_the_loss_is_cross_entropy_at_the_size_of_the_mask_over_what_counts() -> None:
    logits, masks = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 12, 16), dtype=torch.uint8)
    masks[0, :3] = 255
    enlarged = F.interpolate(logits, size=(12, 16), mode="bilinear", align_corners=False)
    theirs = F.cross_entropy(enlarged, masks.long(), ignore_index=255)
    torch.testing.assert_close(segment_loss(logits, masks, 0), theirs)
    assert segment_loss(logits, torch.full_like(masks, 255), 0) == 0


def test_a_head_finds_classes_that_are_in_the_features() -> None:
    coarse = torch.randint(0, 3, (64, 4, 4), generator=torch.Generator().manual_seed(0))
    masks = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2).byte()
    features = F.one_hot(coarse, 5).permute(0, 3, 1, 2).float() + 0.1 * torch.randn(64, 5, 4, 4)
    head = initial_head(5, 3, seed=0)
    schedule = HeadSchedule(100, lambda step: 0.02)
    train_head(head, lambda step: (features, masks), segment_loss, schedule, seed=0)
    assert (head(features).argmax(dim=1) == coarse).float().mean() > 0.95


# Files


def record(**changes: object) -> HeadRecord:
    values = {"dataset": "x", "classes": ("a", "b", "c"), "layers": (-1,), "crop": 32, "patch_size": 8, "model": "m"}
    return HeadRecord.model_validate(values | changes)


def test_a_head_is_saved_and_loaded_with_what_it_is_for(tmp_path: Path) -> None:
    head = initial_head(24, 3, seed=0)
    head(torch.randn(4, 24, 3, 3))  # moves the running statistics
    save_head(head, record(), tmp_path)
    for source in (tmp_path, tmp_path / "head.safetensors"):
        loaded, found = load_head(source, 24, 8)
        assert found == record()
        features = torch.randn(2, 24, 3, 3)
        assert torch.equal(loaded(features), head.eval()(features))
    with pytest.raises(InputError, match="trained on patches of 8 px, the model has 16 px"):
        load_head(tmp_path, 24, 16)
    with pytest.raises(InputError, match="reads 24 channels, tokens of this model have 16"):
        load_head(tmp_path, 16, 8)
    (tmp_path / "head.json").write_text(record(classes=("a", "b")).model_dump_json())
    with pytest.raises(InputError, match="1 layers and 2 classes, the weights have 1 and 3"):
        load_head(tmp_path, 24, 8)
    (tmp_path / "head.json").write_text("{")
    with pytest.raises(InputError, match=r"head.json: not valid JSON"):
        load_head(tmp_path, 24, 8)
    (tmp_path / "head.json").write_text('{"layers": []}')
    with pytest.raises(InputError, match=r"head.json: \w+: .*; write the head again"):
        load_head(tmp_path, 24, 8)


def released(channels: int, classes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "decode_head.conv_seg.weight": torch.randn(classes, channels, 1, 1, generator=generator),
        "decode_head.conv_seg.bias": torch.randn(classes, generator=generator),
        "decode_head.bn.weight": torch.rand(channels, generator=generator),
        "decode_head.bn.bias": torch.randn(channels, generator=generator),
        "decode_head.bn.running_mean": torch.randn(channels, generator=generator),
        "decode_head.bn.running_var": torch.rand(channels, generator=generator) + 0.5,
        "decode_head.bn.num_batches_tracked": torch.tensor(40_000),
    }


@pytest.mark.parametrize(("layers", "classes", "name"), [(1, 150, "ade20k_linear"), (4, 21, "voc2012_ms")])
def test_the_released_heads_of_dinov2_load(tmp_path: Path, layers: int, classes: int, name: str) -> None:
    tensors = released(24 * layers, classes)
    path = tmp_path / f"dinov2_vits14_{name}_head.pth"
    torch.save({"meta": {"iter": 40_000}, "state_dict": tensors}, path)
    head, found = load_head(path, 24, 14)
    assert found.layers == tuple(range(-layers, 0))
    assert (found.classes, found.crop, found.model, found.dataset) == ((), None, None, path.stem)
    features = torch.randn(2, 24 * layers, 3, 3)
    weight, bias, mean, var = (
        tensors[f"decode_head.bn.{k}"] for k in ("weight", "bias", "running_mean", "running_var")
    )
    normed = F.batch_norm(features, mean, var, weight, bias)
    theirs = F.conv2d(normed, tensors["decode_head.conv_seg.weight"], tensors["decode_head.conv_seg.bias"])
    torch.testing.assert_close(head(features), theirs)


def test_files_that_are_no_linear_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"head.safetensors: no such file; give --head a folder"):
        load_head(tmp_path, 24, 14)
    path = tmp_path / "head.pth"
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"head.pth: not a readable weights file"):
        load_head(path, 24, 14)
    depth = {"decode_head.conv_depth.weight": torch.zeros(256, 48, 1, 1)}
    for tensors, message in (
        (depth, "no 1x1 convolution in it"),
        (released(24, 5) | {"decode_head.deep.weight": torch.zeros(2)}, "unexpected tensor deep.weight"),
        ({k: v for k, v in released(24, 5).items() if "var" not in k}, "norm.running_var of shape .* is missing"),
        (released(24, 5) | {"decode_head.conv_seg.bias": torch.zeros(4)}, r"conv.bias has shape \(4,\), not \(5,\)"),
        (released(24, 5) | {"decode_head.bn.bias": torch.full((24,), torch.nan)}, "not finite"),
    ):
        torch.save(tensors, path)
        with pytest.raises(InputError, match=message):
            load_head(path, 24, 14)


# Views


def checkered(height: int, width: int) -> tuple[Image.Image, Tensor]:
    """A picture whose red says the class of each pixel."""
    mask = (np.arange(height)[:, None] // 16 + np.arange(width)[None] // 16).astype(np.uint8) % 4
    pixels = np.stack([mask * 60, np.zeros_like(mask), np.full_like(mask, 90)], axis=-1)
    return Image.fromarray(pixels), torch.from_numpy(mask)


def test_picture_and_mask_move_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitreg_eval.segment_views.change_colours", lambda pixels, random: pixels)
    picture, mask = checkered(96, 128)
    sides = set()
    for seed in range(12):
        view, classes = train_view(picture, mask, PLAIN, 64, seed)
        assert (view.shape, classes.shape, classes.dtype) == ((3, 64, 64), (64, 64), torch.uint8)
        counted = classes != 255
        assert (view[:, ~counted] == 0).all()
        red = PLAIN.denormalize(view)[0] * 255 / 60
        inner = -F.max_pool2d(-counted[None].float(), 9, 1, 4)[0] > 0  # off the borders, where colours mix
        highest, lowest = (F.max_pool2d(sign * classes[None].float(), 7, 1, 3)[0] * sign for sign in (1, -1))
        same = inner & (highest == lowest)
        assert same.sum() > 20
        torch.testing.assert_close(red[same], classes[same].float(), atol=0.35, rtol=0)
        again = train_view(picture, mask, PLAIN, 64, seed)
        assert torch.equal(again[0], view)
        sides.add(int(counted.any(dim=0).sum()))
    assert len(sides) > 1  # some pictures are smaller than the crop, and are filled up


def test_a_flip_turns_both(monkeypatch: pytest.MonkeyPatch) -> None:
    picture, mask = checkered(64, 64)
    monkeypatch.setattr("vitreg_eval.segment_views.RATIOS", (1.0, 1.0))
    monkeypatch.setattr("vitreg_eval.segment_views.change_colours", lambda pixels, random: pixels)
    plain = fixed_view(picture, mask, PLAIN, 64, 0)
    flips = 0
    for seed in range(40):
        view, classes = train_view(picture, mask, PLAIN, 64, seed)
        turned = torch.equal(classes, plain[1].flip(-1))
        assert torch.equal(view, plain[0].flip(-1) if turned else plain[0])
        flips += turned
    assert 8 < flips < 32


def test_a_crop_is_drawn_anew_while_one_class_fills_it() -> None:
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:, :2] = 1
    assert not is_varied(half)  # 75 %
    half[0, 2] = 1
    assert is_varied(half)
    half[:, 3:] = 255
    assert is_varied(half) == (17 / 24 < 0.75)
    assert not is_varied(np.zeros((4, 4), dtype=np.uint8))
    assert not is_varied(np.full((4, 4), 255, dtype=np.uint8))
    mask = np.zeros((64, 512), dtype=np.uint8)
    mask[:, 440:] = 1
    shares = []
    for seed in range(60):
        _, classes = fixed_view(Image.new("RGB", (512, 64)), torch.from_numpy(mask), PLAIN, 64, seed)
        shares.append(0.25 < classes.float().mean() < 0.75)
    assert np.mean(shares) > 0.35  # a single draw would give about 7 % such crops


def test_colours_change_in_range_and_half_of_the_time_each() -> None:
    grey = np.full((4, 4, 3), 100, dtype=np.uint8)
    values = [change_colours(grey, np.random.default_rng(seed)) for seed in range(1000, 3000)]
    assert all((value == value[0, 0]).all() for value in values)
    assert np.mean([(value == 100).all() for value in values]) == pytest.approx(0.25, abs=0.03)  # grey has no hue
    means = np.array([value.mean() for value in values])
    assert means.min() >= (100 - 32) * 0.5 - 3
    assert means.max() <= (100 + 32) * 1.5 + 3
    red = np.full((4, 4, 3), (200, 20, 20), dtype=np.uint8)
    hues = [change_colours(red, np.random.default_rng(seed))[0, 0].argmax() for seed in range(200)]
    assert set(hues) == {0, 1, 2}


def test_a_whole_view_has_the_crop_as_its_shorter_side() -> None:
    assert whole_view(Image.new("RGB", (100, 51)), PLAIN, 32).shape == (3, 32, 62)
    assert whole_view(Image.new("RGB", (20, 30)), PLAIN, 32).shape == (3, 48, 32)


def test_cached_masks_are_sampled_at_the_middle_of_each_part() -> None:
    mask = torch.arange(64, dtype=torch.uint8).reshape(8, 8)
    assert sampled(mask, 2).tolist() == mask[2::4, 2::4].tolist()


# Windows


@pytest.mark.parametrize("side", [512, 513, 682, 853, 854, 1024, 1500])
def test_windows_cover_a_side(side: int) -> None:
    found = starts(side, 512)
    assert len(found) == max(math.ceil((side - 512) / 341), 0) + 1
    assert (found[0], found[-1]) == (0, side - 512)
    assert all(0 < b - a <= 341 for a, b in pairwise(found))


def test_one_window_is_a_full_forward(model: VisionTransformer) -> None:
    head = initial_head(48, 3, seed=0).eval()
    image = torch.randn(3, 32, 32)
    found = Segmenter(model, head, (-2, -1), 32, "fp32", 4)(image, (50, 61))
    with torch.no_grad():
        maps = torch.cat([features.patch_map for features in model.intermediate(image[None], (2, 3))], dim=1)
        logits = F.interpolate(F.interpolate(head(maps), (32, 32), mode="bilinear"), (50, 61), mode="bilinear")
    assert torch.equal(found, logits[0].argmax(dim=0).byte())


def test_windows_that_overlap_are_averaged(model: VisionTransformer) -> None:
    head = initial_head(24, 7, seed=0).eval()
    image = torch.randn(3, 32, 75)
    total, hits = torch.zeros(7, 32, 75), torch.zeros(75)
    with torch.no_grad():
        for left in (0, 21, 42, 43):
            maps = model(image[None, :, :, left : left + 32]).patch_map
            total[:, :, left : left + 32] += F.interpolate(head(maps), (32, 32), mode="bilinear")[0]
            hits[left : left + 32] += 1
    assert len(list(windows((32, 75), 32))) == 4
    for batch_size in (1, 3, 8):
        found = Segmenter(model, head, (-1,), 32, "fp32", batch_size)(image, (32, 75))
        assert (found == (total / hits).argmax(dim=0)).float().mean() > 0.999


def test_the_largest_logit_is_found_a_few_classes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 5, 6)
    theirs = F.interpolate(logits[None], (11, 13), mode="bilinear")[0].argmax(dim=0)
    for room in (1, 11 * 13 * 3, 2**25):
        monkeypatch.setattr("vitreg_eval.sliding.ROOM", room)
        assert torch.equal(enlarged_argmax(logits, (11, 13)).long(), theirs)


# Measuring


def test_numbers_equal_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (6, 9, 8), generator=generator)
    guess = torch.where(torch.rand(6, 9, 8, generator=generator) < 0.6, truth, truth.roll(1, 0))
    truth[0, :4] = 255
    pairs = zip(guess, truth, strict=True)
    areas = torch.stack([class_areas(confusion_matrix(p, t, 8)) for p, t in pairs])  # three classes are absent
    found = segment.metrics(areas, seed=0)
    kept = truth != 255
    labels, predicted = truth[kept].numpy(), guess[kept].numpy()
    assert found["miou"].value == pytest.approx(jaccard_score(labels, predicted, average="macro"))
    assert found["pixel_accuracy"].value == pytest.approx(accuracy_score(labels, predicted))
    assert found["class_accuracy"].value == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert all(metric.n == 6 and metric.ci95 is not None for metric in found.values())


@pytest.mark.parametrize("protocol", ["cached", "dinov2"])
def test_a_head_is_trained_kept_and_measured_again(model: VisionTransformer, tmp_path: Path, protocol: str) -> None:
    data = write_data(tmp_path / "data")
    options = SegmentOptions(
        dataset="masks", data=data, ignore_zero=True, crop=34, steps=30, batch_size=4, protocol=protocol, layers=4
    )
    out = tmp_path / "out"
    out.mkdir()
    outcome = segment.run(model, options, out)
    assert outcome.metrics["pixel_accuracy"].value > 0.75  # colours are easy; one class has half
    assert (outcome.data.n, outcome.data.split) == (4, "val")
    assert outcome.notes[0].startswith(f"protocol {protocol}: ")
    found = HeadRecord.model_validate_json((out / "head.json").read_text())
    assert (found.crop, found.layers) == (32 if protocol == "cached" else 34, (-4, -3, -2, -1))
    assert found.classes == ("class 1", "class 2", "class 3")
    with Image.open(out / "predictions.png") as picture:
        assert picture.width > 300
    measured = SegmentOptions(dataset="masks", data=data, ignore_zero=True, head=out, batch_size=4, crop=found.crop)
    assert segment.run(model, measured, out).metrics == outcome.metrics
    torch.manual_seed(1)
    with pytest.raises(InputError, match=r"trained on the model .*; give the head of this model"):
        segment.run(VisionTransformer(CONFIG), measured, out)
    with pytest.raises(InputError, match=r"3 classes of data, the data has 4 classes of data"):
        segment.run(model, measured.model_copy(update={"ignore_zero": False}), out)


def test_the_numbers_are_counted_at_the_size_of_the_masks(model: VisionTransformer, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    files = [(path, data / "annotations/val" / path.name) for path in sorted((data / "images/val").iterdir())]
    table = {1: 0, 2: 1, 3: 2}
    test = MaskSet(mask_pairs(files, table, data, "x", "val"), ("a", "b", "c"))
    head = initial_head(24, 3, seed=0).eval()
    areas, shown = segment.segment_all(Segmenter(model, head, (-1,), 32, "fp32", 4), test)
    pixels = [40 * (52 + 4 * index) for index in range(4)]
    assert areas[:, 1].sum(dim=1).tolist() == areas[:, 2].sum(dim=1).tolist() == pixels
    assert [one.truth.size for one in shown] == pixels


def test_a_head_needs_no_training_data(model: VisionTransformer, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    (data / "classes.txt").write_text("none\na\nb\nc\n")
    options = SegmentOptions(dataset="masks", data=data, ignore_zero=True, crop=32, steps=2, batch_size=2)
    trained = segment.run(model, options, tmp_path / "out")
    for kind in ("images", "annotations"):
        shutil.rmtree(data / kind / "train")
    alone = options.model_copy(update={"head": tmp_path / "out", "steps": None})
    assert segment.run(model, alone, tmp_path / "again").metrics == trained.metrics


def test_a_strip_is_refused_before_it_fills_the_memory(model: VisionTransformer, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    name = sorted((data / "images/val").iterdir())[0].name
    Image.new("RGB", (100, 2)).save(data / "images/val" / name)
    Image.new("L", (100, 2), 1).save(data / "annotations/val" / name)
    options = SegmentOptions(dataset="masks", data=data, ignore_zero=True, crop=32, steps=1, batch_size=2)
    with pytest.raises(InputError, match=rf"{name}: 100 x 2 pixels, over 20 times as long as wide"):
        segment.run(model, options, tmp_path / "out")


def test_options_that_do_not_go_together_are_named() -> None:
    for given, message in (
        ({"protocol": "dinov2"}, "--protocol dinov2 without --dataset; give ade20k"),
        ({"dataset": "ade20k", "ignore_zero": True}, "--ignore_zero with --dataset ade20k"),
        ({"dataset": "ade20k", "head": Path("h"), "steps": 3}, "--steps 3 with --head h"),
        ({"dataset": "ade20k", "head": Path("h"), "layers": 4}, "--layers 4 with --head h"),
    ):
        with pytest.raises(InputError, match=message):
            SegmentOptions(model=("x",), **given).needs()
    assert SegmentOptions(model=("x",), dataset="ade20k", layers=4).needs() == []


# Pictures


def test_the_legend_names_what_shows() -> None:
    picture = Image.new("RGB", (6, 4))
    truth, predicted = np.full((4, 6), 255, dtype=np.uint8), np.full((4, 6), 3, dtype=np.uint8)
    truth[0] = 7
    assert most_frequent([Segmented(picture, truth, predicted)]) == [3, 7]
    names = [f"class {index}" for index in range(40)]
    figure = plot_segments([Segmented(picture, truth, predicted)] * 2, names)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "class 3",
        "class 7",
        "other classes",
        "not counted",
    ]
    assert [axes.get_title() for axes in figure.axes] == ["image", "truth", "prediction", "", "", ""]
    drawn = figure.axes[1].get_images()[0].get_array()
    colours = palette([3, 7])
    assert (drawn[0] == colours[7]).all()
    assert (drawn[1:] == colours[255]).all()
    assert len({tuple(colour) for colour in palette(range(20)).round(3)}) == 22
    crowd = np.arange(40, dtype=np.uint8).repeat(2).reshape(8, 10)
    assert most_frequent([Segmented(picture, crowd, crowd)]) == list(range(20))


# Sample data

WEIGHTS = Path("weights") / "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.mark.real_data
def test_coco_is_segmented_better_than_by_its_largest_class(shared_data: Path, tmp_path: Path) -> None:
    options = SegmentOptions(
        dataset="masks", data=shared_data / "coco-semseg", ignore_zero=True, crop=224, steps=60, limit=40
    )
    outcome = segment.run(load_model(shared_data / WEIGHTS), options, tmp_path)
    counts = np.zeros(256, dtype=np.int64)
    for path in sorted((shared_data / "coco-semseg/annotations/validation").iterdir()):
        with Image.open(path) as mask:
            counts += np.bincount(np.asarray(mask).ravel(), minlength=256)
    assert outcome.metrics["pixel_accuracy"].value > 1.5 * counts[1:].max() / counts[1:].sum()
    assert json.loads((tmp_path / "head.json").read_text())["classes"][0] == "person"


@pytest.mark.real_data
def test_ade20k_runs(shared_data: Path, tmp_path: Path) -> None:
    options = SegmentOptions(dataset="ade20k", data=shared_data, crop=224, steps=3, batch_size=2, limit=3)
    outcome = segment.run(load_model(shared_data / WEIGHTS), options, tmp_path)
    assert (outcome.data.n, outcome.metrics["miou"].n) == (3, 3)
