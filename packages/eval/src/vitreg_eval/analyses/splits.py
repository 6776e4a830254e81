"""Images to fit a probe on, to choose on, and to judge it by."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from vitreg_core.errors import InputError

TEST, VAL = 0.2, 0.1
"""Part of all images to judge by, and of the others to choose on."""
FEWEST = 10


@dataclass(frozen=True)
class ImageSplit:
    """Indices of images, in order; no image is in two parts, so that no probe has seen what it is judged by."""

    train: Int[Tensor, " train"]
    val: Int[Tensor, " val"]
    test: Int[Tensor, " test"]


def split_images(count: int, seed: int) -> ImageSplit:
    """Split at random, by the seed: 20 % to judge by, and of the others 10 % to choose on.

    Raises:
        InputError: fewer than ten images.
    """
    if count < FEWEST:
        raise InputError(f"a probe on {count} images; give {FEWEST} or more")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    tested = round(count * TEST)
    held = max(round((count - tested) * VAL), 1)
    test, val, train = (part.sort().values for part in order.split([tested, held, count - tested - held]))
    return ImageSplit(train, val, test)
