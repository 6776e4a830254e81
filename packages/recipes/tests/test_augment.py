import colorsys

import pytest
import torch
from PIL import Image
from torch import Tensor
from vitreg_core.config import PreprocessConfig
from vitreg_recipes.augment import seeded, three_augment

PLAIN = PreprocessConfig(image_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
COLOUR = (200, 60, 30)


def augmented(count: int) -> Tensor:
    """A picture of one colour, augmented with many seeds: its middle pixel."""
    transform, picture = three_augment(PLAIN), Image.new("RGB", (40, 30), COLOUR)
    pixels = []
    for seed in range(count):
        with seeded(seed):
            pixels.append(transform(picture)[:, 8, 8])
    return torch.stack(pixels)


def test_exactly_one_of_three_happens_each_a_third_of_the_time() -> None:
    pixels = augmented(300)
    grey = (pixels.amax(1) - pixels.amin(1)) < 0.02
    inverted = (pixels[:, 0] < pixels[:, 1] + 0.02) & ~grey  # solarize turns 200 into 55, below the other two's order
    blurred = ~grey & ~inverted
    for share in (grey, inverted, blurred):
        assert share.float().mean().item() == pytest.approx(1 / 3, abs=0.09)


def test_jitter_keeps_the_hue() -> None:
    pixels = augmented(100)
    kept = pixels[(pixels[:, 0] > pixels[:, 1] + 0.3) & (pixels.amax(1) < 1.0) & (pixels.amin(1) > 0.0)]
    hue = colorsys.rgb_to_hsv(*(value / 255 for value in COLOUR))[0]
    assert len(kept) > 10
    assert all(colorsys.rgb_to_hsv(*pixel.tolist())[0] == pytest.approx(hue, abs=0.02) for pixel in kept)


def test_pixels_are_normalised_to_the_model() -> None:
    config = PreprocessConfig(image_size=8)
    black = three_augment(config)(Image.new("RGB", (20, 20)))
    assert black.shape == (3, 8, 8)
    assert torch.allclose(black.amin((1, 2)), -torch.tensor(config.mean) / torch.tensor(config.std))
