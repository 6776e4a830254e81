"""The crops of a picture: how often and how strongly each change happens, measured."""

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import (
    ColorJitter,
    Compose,
    GaussianBlur,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarize,
    ToTensor,
)
from torchvision.transforms import functional as F
from vitreg_core.config import PreprocessConfig
from vitreg_recipes.dinov2.config import CropsConfig
from vitreg_recipes.dinov2.crops import Crops, MultiCrop

DRAWS = 2000
"""Of each crop; of a tiny picture, so that they take no time."""
PREPROCESS = PreprocessConfig(image_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
RATES = {  # flip, jitter, grey, blur by both settings, solarize: the first, the second global crop, local ones
    "global_1": (0.5, 0.8, 0.2, {"effective": 0.0, "nominal": 1.0}, 0.0),
    "global_2": (0.5, 0.8, 0.2, {"effective": 0.9, "nominal": 0.1}, 0.2),
    "local": (0.5, 0.8, 0.2, {"effective": 0.5, "nominal": 0.5}, 0.0),
}


def multi(**changes: object) -> MultiCrop:
    return MultiCrop(CropsConfig(local_size=8, **changes), PREPROCESS)


def picture(width: int = 24, height: int = 16) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Counts:
    """How often each change reached a picture."""

    def __init__(self) -> None:
        self.flips = self.jitters = self.greys = self.blurs = self.solarized = 0
        self.areas: list[float] = []
        self.aspects: list[float] = []
        self.sigmas: list[float] = []
        self.jitter: list[tuple[float, ...]] = []


@pytest.fixture
def counts() -> Iterator[Counts]:
    """Count what torchvision does to pictures, through the functions that change pixels."""
    found = Counts()
    box, parameters, sigma = RandomResizedCrop.get_params, ColorJitter.get_params, GaussianBlur.get_params

    def crop(image: Image.Image, scale: list[float], ratio: list[float]) -> tuple[int, int, int, int]:
        top, left, height, width = box(image, scale, ratio)
        found.areas.append(height * width / (image.height * image.width))
        found.aspects.append(width / height)
        return top, left, height, width

    def jitter(*ranges: object) -> tuple:
        drawn = parameters(*ranges)
        found.jitter.append(drawn[1:])
        found.jitters += 1
        return drawn

    def blur(low: float, high: float) -> float:
        found.sigmas.append(drawn := sigma(low, high))
        found.blurs += 1
        return drawn

    def counted(name: str, function):  # noqa: ANN001, ANN202
        def run(*arguments: object, **named: object) -> object:
            setattr(found, name, getattr(found, name) + 1)
            return function(*arguments, **named)

        return run

    with (
        mock.patch.object(RandomResizedCrop, "get_params", staticmethod(crop)),
        mock.patch.object(ColorJitter, "get_params", staticmethod(jitter)),
        mock.patch.object(GaussianBlur, "get_params", staticmethod(blur)),
        mock.patch.object(F, "hflip", counted("flips", F.hflip)),
        mock.patch.object(F, "rgb_to_grayscale", counted("greys", F.rgb_to_grayscale)),
        mock.patch.object(F, "solarize", counted("solarized", F.solarize)),
    ):
        yield found


@pytest.mark.parametrize(
    ("which", "setting"),
    [
        *((which, setting) for which in ("global_1", "global_2") for setting in ("effective", "nominal")),
        ("local", "nominal"),
    ],
)
def test_changes_happen_as_often_as_documented(counts: Counts, which: str, setting: str) -> None:
    crop, image = Compose(getattr(multi(blur=setting), which).transforms[:-1]), picture(64, 64)
    for _ in range(DRAWS):
        crop(image)
    flip, jitter, grey, blur, solarize = RATES[which]
    rates = {
        "flips": flip,
        "jitters": jitter,
        "greys": grey,
        "blurs": blur[setting],
        "solarized": solarize,
    }
    for name, rate in rates.items():
        deviation = 4 * (rate * (1 - rate) / DRAWS) ** 0.5
        assert getattr(counts, name) / DRAWS == pytest.approx(rate, abs=deviation + 1e-9), name
    low, high = (0.05, 0.32) if which == "local" else (0.32, 1.0)
    assert low - 0.01 <= min(counts.areas) < low + 0.05
    assert high - 0.05 < max(counts.areas) <= high + 0.01
    assert 0.72 < min(counts.aspects) < 0.8
    assert 1.28 < max(counts.aspects) < 1.39
    brightness, contrast, saturation, hue = ((min(values), max(values)) for values in zip(*counts.jitter, strict=True))
    assert brightness == pytest.approx((0.6, 1.4), abs=0.01)
    assert contrast == pytest.approx((0.6, 1.4), abs=0.01)
    assert saturation == pytest.approx((0.8, 1.2), abs=0.01)
    assert hue == pytest.approx((-0.1, 0.1), abs=0.01)
    if counts.sigmas:
        assert (min(counts.sigmas), max(counts.sigmas)) == pytest.approx((0.1, 2.0), abs=0.05)


def test_the_changes_have_the_documented_order_and_settings() -> None:
    steps = multi().global_2.transforms
    kinds = [type(getattr(step, "transforms", [step])[0]) for step in steps[:-1]]
    assert kinds == [
        RandomResizedCrop,
        RandomHorizontalFlip,
        ColorJitter,
        RandomGrayscale,
        GaussianBlur,
        RandomSolarize,
    ]
    assert steps[0].interpolation.value == "bicubic"
    assert steps[4].transforms[0].kernel_size == (9, 9)
    assert steps[5].threshold == 128


def test_pixels_are_normalised_last() -> None:
    preprocess = PreprocessConfig(image_size=16)
    whole = MultiCrop(CropsConfig(local_crops=0), preprocess)
    finish = whole.global_1.transforms[-1]
    image = picture(16, 16)
    expected = F.normalize(ToTensor()(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.equal(finish(image), expected)


def test_a_picture_gives_two_global_and_some_local_crops() -> None:
    large, small = multi()(picture())
    assert (large.shape, small.shape) == ((2, 3, 16, 16), (8, 3, 8, 8))
    assert not torch.equal(large[0], large[1])
    assert len({tuple(crop.flatten().tolist()) for crop in small}) == 8
    large, small = multi(local_crops=0)(picture(1, 1))
    assert (large.shape, small.shape) == ((2, 3, 16, 16), (0, 3, 8, 8))


def test_a_batch_splits_by_images() -> None:
    images = torch.arange(4.0)

    def of(crops: int, size: int) -> Tensor:
        return (10 * torch.arange(crops)[:, None] + images).flatten()[:, None, None, None].expand(-1, 3, size, size)

    masks = torch.zeros(8, 4, dtype=torch.bool)
    masks[[1, 6]] = True
    first, second = Crops(of(2, 4), of(3, 2), masks).split(2)
    assert first.global_crops[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert second.global_crops[:, 0, 0, 0].tolist() == [2, 3, 12, 13]
    assert second.local_crops[:, 0, 0, 0].tolist() == [2, 3, 12, 13, 22, 23]
    assert first.masks.any(dim=1).tolist() == [False, True, False, False]
    assert second.masks.any(dim=1).tolist() == [False, False, True, False]
    assert len(Crops(of(2, 4), torch.empty(0, 3, 2, 2), masks).split(2)[1].local_crops) == 0
