"""What DINOv2's depth protocol does to a training image at every step."""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from vitreg_core.data.images import to_tensor
from vitreg_core.errors import InputError


class Recipe(NamedTuple):
    """What differs between data sets."""

    box: tuple[int, int, int, int] | None
    """Left, top, right and bottom of the part of the image that is used; all of it if None."""
    crop: tuple[int, int]
    """Height and width of the random crop."""
    brightness: tuple[float, float]
    """Range of the factor on all colours."""


DEGREES = 2.5
GAMMA, COLOUR = (0.9, 1.1), (0.9, 1.1)
NYU = Recipe(box=(43, 45, 608, 472), crop=(416, 544), brightness=(0.75, 1.25))
KITTI = Recipe(box=None, crop=(352, 704), brightness=(0.9, 1.1))
OTHER = NYU._replace(box=None)


def augment(
    image: Image.Image, depth: Float[Tensor, "height width"], recipe: Recipe, seed: int
) -> tuple[Float[Tensor, "3 rows cols"], Float[Tensor, "rows cols"]]:
    """Cut, rotate, mirror, crop and recolour.

    Args:
        image: RGB.
        depth: metres, 0 where there is no reading.
        recipe: of the data set.
        seed: the same seed does the same.

    Returns:
        Pixels in 0 to 1 and depth, at the size of the crop.

    Raises:
        InputError: an image smaller than the crop.
    """
    generator = np.random.default_rng(seed)
    if recipe.box is not None:
        left, top, right, bottom = recipe.box
        image, depth = image.crop(recipe.box), depth[top:bottom, left:right]
    if generator.random() < 0.5:
        image, depth = rotate(image, depth, generator.uniform(-DEGREES, DEGREES))
    pixels = to_tensor(image)
    if generator.random() < 0.5:
        pixels, depth = pixels.flip(-1), depth.flip(-1)
    pixels, depth = random_crop(pixels, depth, recipe.crop, generator)
    return (recolour(pixels, recipe, generator) if generator.random() < 0.5 else pixels), depth


def rotate(
    image: Image.Image, depth: Float[Tensor, "height width"], degrees: float
) -> tuple[Image.Image, Float[Tensor, "height width"]]:
    """Rotate about the centre; what comes in from outside is black and has no reading."""
    turned = image.rotate(degrees, Image.Resampling.BILINEAR)
    return turned, torch.from_numpy(np.array(Image.fromarray(depth.numpy()).rotate(degrees, Image.Resampling.NEAREST)))


def random_crop(
    pixels: Float[Tensor, "3 height width"],
    depth: Float[Tensor, "height width"],
    size: tuple[int, int],
    generator: np.random.Generator,
) -> tuple[Float[Tensor, "3 rows cols"], Float[Tensor, "rows cols"]]:
    """A part of this size from anywhere."""
    height, width = depth.shape
    if height < size[0] or width < size[1]:
        raise InputError(
            f"image of {width}x{height} for crops of {size[1]}x{size[0]}; give --protocol cached, or larger images"
        )
    top, left = (int(generator.integers(most + 1)) for most in (height - size[0], width - size[1]))
    rows, cols = slice(top, top + size[0]), slice(left, left + size[1])
    return pixels[:, rows, cols], depth[rows, cols]


def recolour(
    pixels: Float[Tensor, "3 height width"], recipe: Recipe, generator: np.random.Generator
) -> Float[Tensor, "3 height width"]:
    """Gamma, brightness and a factor for each colour, on values of 0 to 255, which are then clipped."""
    gamma, brightness = generator.uniform(*GAMMA), generator.uniform(*recipe.brightness)
    factors = torch.from_numpy(generator.uniform(*COLOUR, size=(3, 1, 1))).float()
    return ((255 * pixels) ** gamma * brightness * factors).clamp(0, 255) / 255


# Schedule


def learning_rate(step: int, steps: int, base: float = 3e-4, warmup: float = 1 / 3) -> float:
    """A rise over a third of the steps times a cosine, then the cosine, to base / 25,000."""
    rising = round(warmup * steps)
    if step < rising:
        return base / 1000 + base * half_cosine(step / steps) * step / rising
    least = base / 25_000
    return least + (base - least) * half_cosine((step + 1) / steps)


def momentum(step: int, steps: int, warmup: float = 1 / 3) -> float:
    """First decay rate of AdamW: down from 0.95 to 0.85 while the learning rate rises, and back up."""
    rising = round(warmup * steps)
    if step < rising:
        return 0.95 - 0.1 * (1 - half_cosine(step / rising))
    return 0.95 - 0.1 * half_cosine((step - rising) / max(steps - rising, 1))


def half_cosine(share: float) -> float:
    """From 1 to 0 as the share goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * share))
