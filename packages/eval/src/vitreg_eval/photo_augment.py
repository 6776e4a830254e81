"""Random crops and flips of photos, as linear probes are trained on."""

import math

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from vitreg_core.data.images import FILTERS, Preprocess, to_tensor

AREA = (0.08, 1.0)
"""Least and greatest part of the picture."""
ASPECT = (3 / 4, 4 / 3)
"""Least and greatest width over height."""
TRIALS = 10


def random_view(image: Image.Image, preprocess: Preprocess, generator: np.random.Generator) -> Float[Tensor, "3 s s"]:
    """A random part of an RGB picture at the size that a model reads, flipped half of the time, normalised."""
    size = preprocess.config.image_size
    left, top, width, height = random_box(image.width, image.height, generator)
    view = image.crop((left, top, left + width, top + height))
    view = view.resize((size, size), FILTERS[preprocess.config.interpolation])
    if generator.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return preprocess.normalize(to_tensor(view))


def random_box(width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a box of random area and aspect (Szegedy et al. 2015, section 6).

    Where none of ten fits into the picture it is the greatest one in the middle whose aspect is allowed.
    """
    for _ in range(TRIALS):
        area = width * height * generator.uniform(*AREA)
        aspect = math.exp(generator.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            left, top = generator.integers(width - wide + 1), generator.integers(height - high + 1)
            return int(left), int(top), wide, high
    wide, high = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
    return (width - wide) // 2, (height - high) // 2, wide, high
