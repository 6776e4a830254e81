"""The crops of a batch, and the random changes that make them (DINOv2, appendix B; rates as in the official code)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torchvision.transforms import (
    ColorJitter,
    Compose,
    GaussianBlur,
    InterpolationMode,
    RandomApply,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarize,
)
from vitreg_core.config import PreprocessConfig

from vitreg_recipes.augment import Finish
from vitreg_recipes.dinov2.config import CropsConfig

BLUR = {"effective": (0.0, 0.9, 0.5), "nominal": (1.0, 0.1, 0.5), "none": (0.0, 0.0, 0.0)}
"""Probability of a blur: first global crop, second global crop, local crops."""


@dataclass(frozen=True)
class Crops:
    """Crops of one step, of one process, ordered by crop: the first of all images, the second of all, ..."""

    global_crops: Float[Tensor, "b2 3 height width"]
    """Two per image, normalised."""
    local_crops: Float[Tensor, "bn 3 h w"]
    """As many per image as the config says, normalised; none where there are none."""
    masks: Bool[Tensor, "b2 p"]
    """Patches of the global crops that the student does not see."""

    @property
    def images(self) -> Float[Tensor, "b2 3 height width"]:
        """The global crops, which measurements look at."""
        return self.global_crops

    def split(self, parts: int) -> "list[Crops]":
        """Equal parts of the images, in order, each with all its crops."""
        images = len(self.global_crops) // 2

        def part(values: Tensor, number: int) -> Tensor:
            if not len(values):
                return values
            return values.unflatten(0, (-1, images)).chunk(parts, dim=1)[number].flatten(0, 1)

        return [
            Crops(*(part(values, number) for values in (self.global_crops, self.local_crops, self.masks)))
            for number in range(parts)
        ]


class MultiCrop:
    """From a picture to its crops: two global ones, then the local ones."""

    def __init__(self, config: CropsConfig, preprocess: PreprocessConfig) -> None:
        first, second, local = BLUR[config.blur]
        self.size = size = preprocess.image_size
        finish = Finish(preprocess)
        jitter = ColorJitter(*config.jitter)
        self.global_1 = make(size, config.global_scale, jitter, finish, blur=first)
        self.global_2 = make(size, config.global_scale, jitter, finish, blur=second, solarize=0.2)
        self.local = make(config.local_size, config.local_scale, jitter, finish, blur=local)
        self.local_crops, self.local_size = config.local_crops, config.local_size

    def __call__(self, image: Image.Image) -> tuple[Float[Tensor, "2 3 height width"], Float[Tensor, "crops 3 h w"]]:
        """Global and local crops of one RGB picture."""
        large = torch.stack([self.global_1(image), self.global_2(image)])
        small = [self.local(image) for _ in range(self.local_crops)]
        return large, torch.stack(small) if small else torch.empty(0, 3, self.local_size, self.local_size)


def make(
    size: int, scale: tuple[float, float], jitter: ColorJitter, finish: Finish, *, blur: float, solarize: float = 0.0
) -> Compose:
    """Random resized crop, flip, colour jitter, grey, blur, solarisation, normalised pixels."""
    steps: list[object] = [
        RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
        RandomHorizontalFlip(0.5),
        RandomApply([jitter], p=0.8),
        RandomGrayscale(0.2),
        RandomApply([GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))], p=blur),
        RandomSolarize(threshold=128, p=solarize),
        finish,
    ]
    return Compose(steps)
