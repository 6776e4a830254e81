"""How a picture and its mask are resized, cropped and coloured for segmentation (DINOv2, linear evaluation)."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.data.images import Preprocess, cut_ends, resize_shorter, to_tensor

from vitreg_eval.datasets.examples import IGNORE

RATIOS = (0.5, 2.0)
"""Shorter side of a training picture over the crop."""
TRIES, LARGEST_SHARE = 10, 0.75
"""How often a crop is drawn anew while one class has more of its pixels than this."""
BRIGHTNESS, FACTORS, HUE = 32, (0.5, 1.5), 0.5
"""Most that is added to a channel of 0 to 255; range of contrast and saturation; most that the hue turns, in turns."""
CHANCE = 0.5
"""Of each colour change, and of a flip."""

Rgb = UInt8[np.ndarray, "height width 3"]
Mask = UInt8[np.ndarray, "height width"]
Part = tuple[UInt8[np.ndarray, "rows cols 3"], UInt8[np.ndarray, "rows cols"]]
"""Pixels and classes at another size."""


def train_view(
    picture: Image.Image, mask: UInt8[Tensor, "height width"], preprocess: Preprocess, crop: int, seed: int
) -> tuple[Float[Tensor, "3 crop crop"], UInt8[Tensor, "crop crop"]]:
    """A training crop: random scale, place, side and colours, the same for the same seed.

    What the picture does not fill is 0 after normalising, and does not count in the mask.
    """
    random = np.random.default_rng(seed)
    pixels, classes = resized(picture, mask, int(crop * random.uniform(*RATIOS)))
    pixels, classes = random_crop(pixels, classes, crop, random)
    if random.random() < CHANCE:
        pixels, classes = pixels[:, ::-1], classes[:, ::-1]
    return padded(change_colours(pixels, random), classes, preprocess, crop)


def fixed_view(
    picture: Image.Image, mask: UInt8[Tensor, "height width"], preprocess: Preprocess, crop: int, seed: int
) -> tuple[Float[Tensor, "3 crop crop"], UInt8[Tensor, "crop crop"]]:
    """The one crop of a picture whose features are kept: shorter side as the crop, place drawn by the seed."""
    pixels, classes = resized(picture, mask, crop)
    return padded(*random_crop(pixels, classes, crop, np.random.default_rng(seed)), preprocess, crop)


def whole_view(picture: Image.Image, preprocess: Preprocess, crop: int) -> Float[Tensor, "3 height width"]:
    """A whole picture to measure on, its shorter side as the crop."""
    return preprocess.normalize(to_tensor(resize_shorter(picture, crop, Image.Resampling.BILINEAR)))


def resized(picture: Image.Image, mask: UInt8[Tensor, "height width"], shorter: int) -> Part:
    """Picture and mask with a shorter side of so many pixels; classes are not mixed."""
    classes = cut_ends(Image.fromarray(mask.numpy()))
    return (
        np.asarray(resize_shorter(cut_ends(picture), shorter, Image.Resampling.BILINEAR)),
        np.asarray(resize_shorter(classes, shorter, Image.Resampling.NEAREST)),
    )


def random_crop(pixels: Rgb, classes: Mask, crop: int, random: np.random.Generator) -> Part:
    """A part of at most crop x crop pixels, drawn anew up to ten times while one class fills over 75 % of it."""
    window = next(windows(classes, crop, random))
    for drawn in windows(classes, crop, random):
        window = drawn
        if is_varied(classes[window]):
            break
    return pixels[window], classes[window]


def windows(classes: Mask, crop: int, random: np.random.Generator) -> Iterator[tuple[slice, slice]]:
    """Random places of a crop."""
    for _ in range(TRIES):
        top, left = (int(random.integers(max(side - crop, 0) + 1)) for side in classes.shape)
        yield slice(top, top + crop), slice(left, left + crop)


def is_varied(classes: Mask) -> bool:
    """Whether a crop has several classes and none fills more than 75 % of what counts."""
    counts = np.bincount(classes[classes != IGNORE], minlength=1)
    return bool((counts > 0).sum() > 1 and counts.max() < LARGEST_SHARE * counts.sum())


def padded(
    pixels: Rgb, classes: Mask, preprocess: Preprocess, crop: int
) -> tuple[Float[Tensor, "3 crop crop"], UInt8[Tensor, "crop crop"]]:
    """Normalised pixels and classes, filled up at the right and below."""
    image = preprocess.normalize(to_tensor(Image.fromarray(np.ascontiguousarray(pixels))))
    mask = torch.from_numpy(np.array(classes))
    rest = (0, crop - mask.shape[1], 0, crop - mask.shape[0])
    return F.pad(image, rest), F.pad(mask, rest, value=IGNORE)


# Colours


def change_colours(pixels: Rgb, random: np.random.Generator) -> Rgb:
    """Random brightness, contrast, saturation and hue, each half of the time; contrast first or last."""
    if random.random() < CHANCE:
        pixels = scaled(pixels, 1.0, random.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast = random.uniform(*FACTORS) if random.random() < CHANCE else 1.0
    first = random.random() < CHANCE
    pixels = turn_colours(scaled(pixels, contrast if first else 1.0, 0.0), random)
    return scaled(pixels, 1.0 if first else contrast, 0.0)


def turn_colours(pixels: Rgb, random: np.random.Generator) -> Rgb:
    """Random saturation and hue."""
    saturation = random.uniform(*FACTORS) if random.random() < CHANCE else 1.0
    turn = random.uniform(-HUE, HUE) if random.random() < CHANCE else 0.0
    if saturation == 1.0 and turn == 0.0:
        return pixels
    parts = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
    parts[..., 0] += np.uint8(round(turn * 256) % 256)  # hue goes round at 256
    parts[..., 1] = scaled(parts[..., 1], saturation, 0.0)
    bands = [Image.fromarray(np.ascontiguousarray(parts[..., band])) for band in range(3)]
    return np.asarray(Image.merge("HSV", bands).convert("RGB"))


def scaled(values: UInt8[np.ndarray, "*shape"], factor: float, added: float) -> UInt8[np.ndarray, "*shape"]:
    """Values times a factor plus a number, kept in 0 to 255."""
    if factor == 1.0 and added == 0.0:
        return values
    return (values.astype(np.float32) * factor + added).clip(0, 255).astype(np.uint8)
