import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from vitreg_core import VisionTransformer, ViTConfig, load_model
from vitreg_core.errors import InputError
from vitreg_core.features import Features
from vitreg_eval.config import DepthOptions
from vitreg_eval.datasets import scenes
from vitreg_eval.datasets.depth import crop_of, open_depth
from vitreg_eval.datasets.depth_files import Crop, DepthSet
from vitreg_eval.datasets.examples import Pairs
from vitreg_eval.dense import STATE
from vitreg_eval.depth_augment import KITTI, NYU, augment, learning_rate, momentum
from vitreg_eval.depth_head import (
    DepthHead,
    HeadRecord,
    TrainedHead,
    resize_depth,
)
from vitreg_eval.depth_predict import fitted_size, nearest_depth, predict_depth, unpadded
from vitreg_eval.depth_train import depth_loss, fit_depth
from vitreg_eval.extract import train_and_test
from vitreg_eval.metrics import depth_errors
from vitreg_eval.results import DataRecord
from vitreg_eval.tasks import depth

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, registers=1)
WEIGHTS = "weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(CONFIG).eval()
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(20)  # so that the random model tells bright from dark
    return model


@pytest.fixture
def rooms(tmp_path: Path) -> Path:
    """An RGB-D folder of 40x56 pictures of bare walls, brighter where they are nearer, as lists."""
    return write_rooms(tmp_path / "rooms", {"train": 20, "test": 6})


def write_rooms(root: Path, counts: dict[str, int], size: tuple[int, int] = (40, 56)) -> Path:
    generator = np.random.default_rng(0)
    root.mkdir(parents=True)
    for split, count in counts.items():
        lines = []
        for index in range(count):
            metres = np.full(size, generator.uniform(1, 5))
            pixels = np.repeat((255 * (1 - metres / 6))[..., None], 3, axis=2).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{split}_{index}_rgb.png")
            millimetres = (1000 * metres).astype(np.uint16)
            millimetres[:2] = 0
            Image.fromarray(millimetres).save(root / f"{split}_{index}_depth.png")
            lines.append(f"/{split}_{index}_rgb.png /{split}_{index}_depth.png 518.8579")
        (root / f"{split}.txt").write_text("\n".join(lines))
    return root


# Errors


def test_errors_equal_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, predicted = (torch.rand(3, 5, 6, generator=generator) * 4 + 0.5 for _ in range(2))
    found = depth_errors(predicted, truth)
    t, p = truth.double().numpy(), predicted.double().numpy()
    ratio = np.maximum(t / p, p / t)
    expected = {
        "rmse": np.sqrt(((t - p) ** 2).mean(axis=(1, 2))),
        "abs_rel": (np.abs(t - p) / t).mean(axis=(1, 2)),
        "sq_rel": ((t - p) ** 2 / t).mean(axis=(1, 2)),
        "log10": np.abs(np.log10(t) - np.log10(p)).mean(axis=(1, 2)),
        **{f"delta{power}": (ratio < 1.25**power).mean(axis=(1, 2)) for power in (1, 2, 3)},
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name).numpy(), values, rtol=1e-12)


@pytest.mark.parametrize(
    ("crop", "size", "expected"),
    [
        ("nyu", (480, 640), (45, 471, 41, 601)),
        ("nyu", (240, 320), (22, 236, 20, 300)),
        ("sun", (530, 730), (45, 471, 41, 601)),
        ("garg", (352, 1216), (143, 349, 43, 1172)),
        ("eigen", (352, 1216), (117, 321, 43, 1172)),
        ("none", (7, 9), (0, 7, 0, 9)),
    ],
)
def test_the_part_of_an_image_that_counts(crop: Crop, size: tuple[int, int], expected: tuple[int, ...]) -> None:
    rows, cols = crop_of(crop, *size)
    assert (rows.start, rows.stop, cols.start, cols.stop) == expected


def test_only_the_part_that_counts_and_the_readings_in_range_are_measured() -> None:
    truth, predicted = torch.full((480, 640), 2.0), torch.full((480, 640), 2.0)
    predicted[:45], predicted[471:], predicted[:, :41], predicted[:, 601:] = 9, 9, 9, 9
    truth[100, 100], predicted[100, 100] = 0, 9
    truth[101, 100], predicted[101, 100] = 10, 1
    predicted[45, 41] = 3
    record = DataRecord(name="rooms", split="test", n=0, hash="")
    data = DepthSet(Pairs(record, lambda index: (Image.new("RGB", (1, 1)), truth), ()), max_depth=10.0, crop="nyu")
    found = depth.errors_of(predicted, truth, data, "room")
    assert found.rmse.item() == pytest.approx(math.sqrt(1 / (426 * 560 - 2)))
    with pytest.raises(InputError, match=r"room has no true depth between 0.001 and 10\.0 m"):
        depth.errors_of(predicted, torch.zeros(480, 640), data, "room")


# Predictions


def test_the_mirrored_image_is_averaged_in(model: VisionTransformer) -> None:
    record = HeadRecord(layers=(3,), channels=48)
    torch.manual_seed(1)
    head = DepthHead(48)
    torch.nn.init.normal_(head.conv.weight)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)

    def predict(array: np.ndarray, *, flip: bool) -> Tensor:
        image = Image.fromarray(np.ascontiguousarray(array))
        return predict_depth(model, TrainedHead(head, record), image, DepthOptions(protocol="dinov2", flip=flip))

    plain, mirrored = predict(pixels, flip=False), predict(pixels[:, ::-1], flip=False)
    assert not torch.allclose(plain, mirrored.flip(-1), atol=1e-4)
    torch.testing.assert_close(predict(pixels, flip=True), (plain + mirrored.flip(-1)) / 2)


def test_padding_is_cut_away_unless_the_head_was_released() -> None:
    """480x640 and patches of 14 px: 5 + 5 rows and 2 + 2 columns (reference/dinov2.md 3.5)."""
    padded = torch.arange(490.0)[:, None] + torch.zeros(644)
    own = unpadded(padded[None], torch.Size([480, 640]), 14, released=False)
    assert torch.equal(own[0, :, 0], torch.arange(5.0, 485.0))
    theirs = unpadded(padded[None], torch.Size([480, 640]), 14, released=True)
    torch.testing.assert_close(theirs, resize_depth(padded[None], (480, 640)))
    assert theirs[0, 0, 0] < 1


def test_images_are_resized_to_whole_patches_of_their_aspect(model: VisionTransformer) -> None:
    assert fitted_size(model, (480, 640), DepthOptions(image_size=48)) == (48, 64)
    assert fitted_size(model, (640, 480), DepthOptions()) == (40, 32)
    with pytest.raises(InputError, match="--image_size 7 is smaller than a patch of 8 px; give more"):
        fitted_size(model, (480, 640), DepthOptions(image_size=7))


def test_depth_is_resized_without_mixing_readings_and_gaps() -> None:
    depths = torch.tensor([[0.0, 8.0], [4.0, 0.0]]).repeat_interleave(6, 0).repeat_interleave(6, 1)
    assert set(nearest_depth(depths, (4, 4)).unique().tolist()) == {0.0, 4.0, 8.0}


# Augmentation


def test_augmentation_keeps_depth_over_its_picture() -> None:
    """Where the picture's colour is its depth, it still is after cutting, mirroring and a nearly invisible rotation."""
    metres = np.add.outer(np.linspace(1, 3, 480), np.linspace(0, 4, 640)).astype(np.float32)
    image = Image.fromarray(np.repeat((metres * 30).round().astype(np.uint8)[..., None], 3, axis=2))
    plain = NYU._replace(brightness=(1.0, 1.0))
    seen = set()
    for seed in range(12):
        pixels, depths = augment(image, torch.from_numpy(metres), plain, seed)
        assert pixels.shape == (3, 416, 544)
        assert depths.shape == (416, 544)
        inside = depths > 0
        grey = pixels.mean(dim=0)[inside]
        assert np.corrcoef(grey.numpy(), depths[inside].numpy())[0, 1] > 0.97  # bright ends are clipped
        seen.add(bool(depths[200, 500] > depths[200, 40]))
    assert seen == {True, False}
    again, _ = augment(image, torch.from_numpy(metres), plain, 3)
    assert torch.equal(again, augment(image, torch.from_numpy(metres), plain, 3)[0])


def test_the_nyu_box_leaves_the_border_out() -> None:
    metres = torch.full((480, 640), 2.0)
    metres[:45], metres[472:], metres[:, :43], metres[:, 608:] = 9, 9, 9, 9
    image = Image.new("RGB", (640, 480))
    assert all(augment(image, metres, NYU, seed)[1].max() <= 2 for seed in range(8))


def test_images_smaller_than_a_crop_are_refused() -> None:
    with pytest.raises(InputError, match="image of 640x300 for crops of 704x352; give --protocol cached"):
        augment(Image.new("RGB", (640, 300)), torch.ones(300, 640), KITTI, 0)


def test_the_learning_rate_rises_for_a_third_and_ends_near_zero() -> None:
    """reference/dinov2.md 3.5: T = 38,400, W = 12,800, base 3e-4."""
    steps, base = 38_400, 3e-4
    assert learning_rate(0, steps) == pytest.approx(base / 1000)
    half = base / 1000 + base * 0.5 * (1 + math.cos(math.pi / 6)) * 0.5
    assert learning_rate(6400, steps) == pytest.approx(half)
    assert learning_rate(steps - 1, steps) == pytest.approx(base / 25_000)
    assert max(range(0, steps, 100), key=lambda step: learning_rate(step, steps)) == 12_800
    assert learning_rate(12_800, steps) == pytest.approx(base * 0.75, rel=1e-3)
    assert [momentum(step, steps) for step in (0, 12_800)] == pytest.approx([0.95, 0.85])
    assert momentum(steps - 1, steps) == pytest.approx(0.95, abs=1e-4)


# The task


def test_a_head_learns_depth_that_is_in_the_pictures(model: VisionTransformer, rooms: Path, tmp_path: Path) -> None:
    options = DepthOptions(dataset="rgbd", data=rooms, steps=100, image_size=16)
    outcome = depth.run(model, options, tmp_path)
    found = outcome.metrics
    assert found["rmse"].n == 6
    assert found["rmse"].value < 0.6 * found["mean_depth_rmse"].value
    assert {path.name for path in tmp_path.iterdir()} >= {"head.safetensors", "head.json", "predictions.png"}
    assert "not comparable with published values" in outcome.notes[0]
    again = depth.run(model, options.model_copy(update={"head": tmp_path}), tmp_path / "again")
    assert again.metrics["rmse"] == found["rmse"]
    assert "mean_depth_rmse" not in again.metrics


def test_shuffled_depths_teach_no_more_than_their_mean(model: VisionTransformer, tmp_path: Path) -> None:
    root = write_rooms(tmp_path / "rooms", {"train": 24, "test": 12})
    lines = [line.split() for line in (root / "train.txt").read_text().splitlines()]
    order = np.random.default_rng(0).permutation(len(lines))
    shuffled = [f"{lines[a][0]} {lines[b][1]}" for a, b in enumerate(order)]
    (root / "train.txt").write_text("\n".join(shuffled))
    options = DepthOptions(dataset="rgbd", data=root, steps=100, image_size=16)
    found = depth.run(model, options, tmp_path / "out").metrics
    assert found["rmse"].value > 0.9 * found["mean_depth_rmse"].value


@pytest.mark.parametrize("patch_size", [8, 14])
def test_the_dinov2_protocol_runs_the_backbone_at_every_step(
    tmp_path: Path, patch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(CONFIG.model_copy(update={"patch_size": patch_size, "image_size": 4 * patch_size})).eval()
    root = write_rooms(tmp_path / "rooms", {"train": 4, "test": 2}, size=(48, 60))
    monkeypatch.setattr("vitreg_eval.depth_train.OTHER", NYU._replace(box=None, crop=(32, 40)))
    monkeypatch.setattr("vitreg_eval.depth_train.BATCH", 2)
    seen: list[tuple[int, ...]] = []
    intermediate = VisionTransformer.intermediate

    def spy(self: VisionTransformer, images: Tensor, layers: Sequence[int], *, norm: bool = True) -> list[Features]:
        seen.append(tuple(images.shape))
        return intermediate(self, images, layers, norm=norm)

    monkeypatch.setattr(VisionTransformer, "intermediate", spy)
    options = DepthOptions(dataset="rgbd", data=root, protocol="dinov2", layers=4, steps=3)
    outcome = depth.run(model, options, tmp_path / "out")
    side = (32, 40) if patch_size == 8 else (42, 42)
    assert seen[:3] == [(2, 3, *side)] * 3
    full = (48, 64) if patch_size == 8 else (56, 70)
    assert seen[3:] == [(2, 3, *full)] * 2
    assert outcome.metrics["rmse"].n == 2


def test_a_killed_training_ends_with_the_same_head(
    model: VisionTransformer, rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = DepthOptions(dataset="rgbd", data=rooms, steps=6)
    data = open_depth(options, "train")
    whole = fit_depth(model, data, options, tmp_path / "whole").head

    def killed(max_depth: float, warm_up: int, predicted: Tensor, truth: Tensor, step: int) -> Tensor:
        if step == 5:
            raise KeyboardInterrupt
        return depth_loss(max_depth, warm_up, predicted, truth, step)

    with monkeypatch.context() as patch:
        patch.setattr("vitreg_eval.depth_train.depth_loss", killed)
        patch.setattr("vitreg_eval.depth_train.SAVE_EVERY", 2)
        with pytest.raises(KeyboardInterrupt):
            fit_depth(model, data, options, tmp_path / "killed")
    assert (tmp_path / "killed" / STATE).is_file()
    resumed = fit_depth(model, data, options, tmp_path / "killed").head
    assert torch.equal(resumed.conv.weight, whole.conv.weight)
    other = fit_depth(model, data, options.model_copy(update={"seed": 1}), tmp_path / "killed").head
    assert not torch.equal(other.conv.weight, whole.conv.weight)


def test_a_picture_in_both_splits_is_refused(model: VisionTransformer, rooms: Path, tmp_path: Path) -> None:
    line = (rooms / "train.txt").read_text().splitlines()[3]
    with (rooms / "test.txt").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(InputError, match=r"train_3_rgb\.png is in the training and the test split, as 1 in all"):
        depth.run(model, DepthOptions(dataset="rgbd", data=rooms), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 4}, "--layers 4 without --dataset; give nyu, kitti, sun-rgbd or rgbd"),
        ({"dataset": "nyu", "head": "h", "steps": 3}, "--steps 3 with --head h, which is not trained"),
        ({"dataset": "nyu", "head": "h", "layers": 4}, "--layers 4 with --head h, which is not trained"),
        ({"dataset": "nyu", "protocol": "dinov2", "image_size": 64}, "--image_size 64 with --protocol dinov2"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DepthOptions.model_validate({"model": ("x",), **options}).needs()


def test_features_in_the_cache_are_read_again(
    model: VisionTransformer, rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = DepthOptions(dataset="rgbd", data=rooms, steps=2, image_size=16, cache=tmp_path / "cache")
    data = open_depth(options, "train")
    first = fit_depth(model, data, options, tmp_path / "a").head

    def fail(self: VisionTransformer, images: Tensor, layers: Sequence[int], *, norm: bool = True) -> list[Features]:
        raise AssertionError("computed again")

    monkeypatch.setattr(VisionTransformer, "intermediate", fail)
    again = fit_depth(model, data, options, tmp_path / "b").head
    assert torch.equal(again.conv.weight, first.conv.weight)


def test_a_state_of_another_data_set_is_not_used(model: VisionTransformer, rooms: Path, tmp_path: Path) -> None:
    """The data sets differ in what is done to the same files."""
    options = DepthOptions(dataset="rgbd", data=rooms, steps=2, image_size=16)
    data = open_depth(options, "train")
    fit_depth(model, data, options, tmp_path)
    before = torch.load(tmp_path / STATE, weights_only=True)["identity"]
    fit_depth(model, data, options.model_copy(update={"dataset": "nyu"}), tmp_path)
    assert torch.load(tmp_path / STATE, weights_only=True)["identity"] != before


def test_a_strip_is_refused_before_it_fills_the_memory(model: VisionTransformer, rooms: Path, tmp_path: Path) -> None:
    Image.new("RGB", (100, 2)).save(rooms / "test_0_rgb.png")
    Image.fromarray(np.full((2, 100), 2000, dtype=np.uint16)).save(rooms / "test_0_depth.png")
    with pytest.raises(InputError, match=r"test_0_rgb\.png: 100 x 2 pixels, over 20 times as long as wide"):
        depth.run(model, DepthOptions(dataset="rgbd", data=rooms, steps=1, image_size=16), tmp_path / "out")


def test_sun_rgbd_takes_a_trained_head() -> None:
    missing = DepthOptions(model=("x",), dataset="sun-rgbd").needs()
    assert missing == ["--head FILE, a head trained on nyu (sun-rgbd is measured by transfer)"]


def test_a_model_without_class_token_is_refused(rooms: Path, tmp_path: Path) -> None:
    model = VisionTransformer(CONFIG.model_copy(update={"class_token": False, "pool": "avg"})).eval()
    with pytest.raises(InputError, match="no class token"):
        depth.run(model, DepthOptions(dataset="rgbd", data=rooms), tmp_path)


def test_scenes_are_measured_and_drawn(model: VisionTransformer, tmp_path: Path) -> None:
    options = DepthOptions(train_images=96, test_images=64, steps=3)
    outcome = depth.run(model, options, tmp_path)
    assert set(outcome.metrics) == {"rmse", "abs_rel", "delta1"}
    assert outcome.metrics == depth.evaluate(*train_and_test(model, options), options)
    assert (tmp_path / "predictions.png").stat().st_size > 1000
    assert outcome.data == scenes(model.preprocess, 64, 0, "test").data


@pytest.mark.real_data
def test_a_few_steps_on_seven_scenes_beat_the_mean_depth(shared_data: Path, tmp_path: Path) -> None:
    model = load_model(shared_data / WEIGHTS)
    options = DepthOptions(dataset="rgbd", data=shared_data / "seven-scenes", steps=120, image_size=96)
    found = depth.run(model, options, tmp_path).metrics
    assert found["rmse"].n == 25
    assert found["rmse"].value < 0.8 * found["mean_depth_rmse"].value
    assert found["delta1"].value > found["mean_depth_delta1"].value
