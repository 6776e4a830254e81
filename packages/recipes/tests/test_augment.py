import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy import stats
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import Preprocess
from vitreg_recipes.augment import Name, seeded, training_transform

PLAIN = PreprocessConfig(image_size=24, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
NAMES: tuple[Name, ...] = ("three", "three_simple_crop", "rand_augment")


@pytest.fixture
def photo() -> Image.Image:
    """Smooth noise in all colours, 60 x 40 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 15, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((60, 40), Image.Resampling.BICUBIC)


def levels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def middle(name: Name) -> Callable[[Image.Image], Image.Image]:
    """What a transform does between its crop and its tensor."""
    return training_transform(name, PLAIN).transforms[1]


def jitter_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.transforms.ColorJitter.forward", lambda self, image: image)


def test_each_of_three_is_pillows_and_comes_a_third_of_the_time(
    monkeypatch: pytest.MonkeyPatch, photo: Image.Image
) -> None:
    jitter_off(monkeypatch)
    radii: list[float] = []
    real = ImageFilter.GaussianBlur
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda radius: radii.append(radius) or real(radius))
    grey, solarized, blurred, augment = levels(photo.convert("L").convert("RGB")), 0, 0, middle("three")
    greys = 0
    random.seed(0)
    for _ in range(900):
        before = len(radii)
        seen = levels(augment(photo))
        if len(radii) > before:
            blurred += 1
            assert torch.equal(seen, levels(photo.filter(real(radii[-1]))))
        elif torch.equal(seen, levels(ImageOps.solarize(photo, 128))):
            solarized += 1
        else:
            greys += 1
            torch.testing.assert_close(seen, grey, atol=1.01 / 255, rtol=0)
    assert stats.chisquare([greys, solarized, blurred]).pvalue > 0.01
    assert stats.kstest(radii, stats.uniform(0.1, 1.9).cdf).pvalue > 0.01
    assert min(radii) >= 0.1
    assert max(radii) <= 2.0


def test_jitter_is_by_up_to_a_third_without_hue_and_always_on() -> None:
    names = [type(step).__name__ for step in middle("three").transforms]
    assert names == ["AutoAugment", "ColorJitter"]
    jitter = middle("three").transforms[1]
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.7, 1.3)
    assert jitter.hue is None


def test_the_first_crop_is_torchvisions(monkeypatch: pytest.MonkeyPatch, photo: Image.Image) -> None:
    boxes = []
    crop = training_transform("three", PLAIN).transforms[0].transforms[0]
    assert crop.scale == (0.08, 1.0)
    assert crop.ratio == pytest.approx((3 / 4, 4 / 3))
    theirs = v2.RandomResizedCrop(24, interpolation=v2.InterpolationMode.BICUBIC)
    for seed in range(20):
        with seeded(seed):
            top, left, height, width = box = crop.get_params(photo, crop.scale, crop.ratio)
        with seeded(seed):
            ours = levels(crop(photo))
        boxes.append(box)
        expected = v2.functional.resized_crop(photo, top, left, height, width, [24, 24], theirs.interpolation)
        torch.testing.assert_close(ours, levels(expected), atol=0, rtol=0)
    assert len(set(boxes)) > 15


def test_simple_crop_is_a_window_of_the_mirrored_resized_image(photo: Image.Image) -> None:
    crop, seen = training_transform("three_simple_crop", PLAIN).transforms[0], set()
    small = photo.resize((36, 24), Image.Resampling.BICUBIC)
    mirrored = np.pad(np.array(small), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {
        np.ascontiguousarray(mirrored[top : top + 24, left : left + 24][:, ::flip]).tobytes(): (top, left, flip)
        for top in range(9)
        for left in range(21)
        for flip in (1, -1)
    }
    for seed in range(300):
        with seeded(seed):
            seen.add(windows[np.array(crop(photo)).tobytes()])
    assert {top for top, _, _ in seen} == set(range(9))
    assert {left for _, left, _ in seen} == set(range(21))
    assert {flip for _, _, flip in seen} == {1, -1}


def test_half_of_the_images_are_flipped(photo: Image.Image) -> None:
    for name in NAMES:
        flip = training_transform(name, PLAIN).transforms[0].transforms[-1]
        torch.manual_seed(0)
        flipped = sum(torch.equal(levels(flip(photo)), levels(ImageOps.mirror(photo))) for _ in range(400))
        assert stats.binomtest(flipped, 400, 0.5).pvalue > 0.01


def test_rand_augment_is_timms_without_jitter(photo: Image.Image) -> None:
    config = PreprocessConfig(image_size=24)
    options = {
        "translate_const": int(24 * 0.45),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in config.mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    theirs, ours = rand_augment_transform("rand-m9-mstd0.5-inc1", options), training_transform("rand_augment", config)
    crop, normalise = ours.transforms[0], v2.Normalize(config.mean, config.std)
    seen = []
    for seed in range(20):
        with seeded(seed):
            expected = normalise(levels(theirs(crop(photo))))
        with seeded(seed):
            seen.append(ours(photo))
        torch.testing.assert_close(seen[-1], expected)
    assert not torch.allclose(seen[0], seen[1])


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_normalised_to_the_model_and_follow_from_the_seed(name: Name, photo: Image.Image) -> None:
    config = PreprocessConfig(image_size=8)
    transform = training_transform(name, config)
    with seeded(1, 2):
        first = transform(photo)
    state = random.getstate(), torch.get_rng_state()
    with seeded(1, 2):
        assert torch.equal(transform(photo), first)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert first.shape == (3, 8, 8)
    lowest = -torch.tensor(config.mean) / torch.tensor(config.std)
    highest = (1 - torch.tensor(config.mean)) / torch.tensor(config.std)
    assert (first.amin((1, 2)) >= lowest - 1e-6).all()
    assert (first.amax((1, 2)) <= highest + 1e-6).all()
    if name != "rand_augment":  # which may well invert black
        black = transform(Image.new("RGB", (20, 20)))
        torch.testing.assert_close(black.amin((1, 2)), lowest)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (500, 9)])
def test_images_of_any_shape_are_cropped(size: tuple[int, int]) -> None:
    for name in NAMES:
        assert training_transform(name, PLAIN)(Image.new("RGB", size, (9, 99, 199))).shape == (3, 24, 24)


def test_evaluation_keeps_the_whole_shorter_side(photo: Image.Image) -> None:
    expected = levels(photo.resize((36, 24), Image.Resampling.BICUBIC).crop((6, 0, 30, 24)))
    torch.testing.assert_close(Preprocess(PLAIN)(photo), expected, atol=1e-6, rtol=0)
