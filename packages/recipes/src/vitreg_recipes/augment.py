"""Training transforms, and randomness that depends on the sample alone."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from vitreg_core.config import PreprocessConfig

Transform = Callable[[Image.Image], Tensor]


def three_augment(preprocess: PreprocessConfig) -> Transform:
    """DeiT-III's 3-Augment: random resized crop, flip, one of grey, solarize and blur, colour jitter; normalised."""
    return create_transform(
        input_size=preprocess.image_size,
        is_training=True,
        auto_augment="3a",
        color_jitter=0.3,
        interpolation="bicubic",
        mean=preprocess.mean,
        std=preprocess.std,
    )


@contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Seed the CPU generators of python, NumPy and torch inside the block, and put them back after it."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (what transforms draw from)
    seeds = np.random.SeedSequence(words).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])  # noqa: NPY002
    torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would seed the GPU as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
