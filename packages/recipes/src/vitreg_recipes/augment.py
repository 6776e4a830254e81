"""Training transforms, and randomness that depends on the sample alone."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, RandomHorizontalFlip, Resize
from vitreg_core.config import PreprocessConfig

Transform = Callable[[Image.Image], Tensor]
Name = Literal["three", "three_simple_crop", "rand_augment"]


def training_transform(name: Name, preprocess: PreprocessConfig) -> Transform:
    """Augmentation of a DeiT-III recipe (DeiT III, section 3), normalised for the model.

    Args:
        name: `three`: random resized crop, flip, exactly one of grey, solarize and blur, colour jitter without hue
            (3-Augment); `three_simple_crop`: the same after a crop that keeps nearly all of the shorter side (SRC);
            `rand_augment`: random resized crop, flip, RandAugment m9 mstd0.5 inc1, no colour jitter.
        preprocess: size of the crop in pixels, mean and deviation of the pixels.
    """
    crop, augment, _ = create_transform(
        input_size=preprocess.image_size,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1" if name == "rand_augment" else "3a",
        color_jitter=None if name == "rand_augment" else 0.3,
        interpolation="bicubic",
        separate=True,
    )
    crop = simple_crop(preprocess.image_size) if name == "three_simple_crop" else crop
    return Compose([crop, augment, Finish(preprocess)])


def simple_crop(size: int) -> Compose:
    """Shorter side to `size` pixels, 4 more mirrored on all sides, a random crop, a flip (DeiT III: SRC)."""
    return Compose(
        [
            Resize(size, InterpolationMode.BICUBIC),
            RandomCrop(size, padding=4, padding_mode="reflect"),
            RandomHorizontalFlip(),
        ]
    )


class Finish:
    """A picture as a normalised tensor: the bits of torchvision's ToTensor and Normalize, without their copies."""

    def __init__(self, preprocess: PreprocessConfig) -> None:
        self.mean = torch.tensor(preprocess.mean).view(3, 1, 1)
        self.std = torch.tensor(preprocess.std).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """Pixels of an RGB picture, normalised."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.div_(255).sub_(self.mean).div_(self.std)


def seed_generators(*words: int) -> None:
    """Seed the CPU generators of python, NumPy and torch."""
    seeds = np.random.SeedSequence(words).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])  # noqa: NPY002 (what transforms draw from)
    torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would seed the GPU as well


@contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Seed the CPU generators of python, NumPy and torch inside the block, and put them back after it."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed_generators(*words)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
