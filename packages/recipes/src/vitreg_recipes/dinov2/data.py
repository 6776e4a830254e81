"""Images without labels as crops: scenes, or pictures of a folder, the hub or shards."""

import random
import sys
from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError

from vitreg_recipes.augment import seeded
from vitreg_recipes.config import SCENES
from vitreg_recipes.data.batch import Share
from vitreg_recipes.data.order import Shuffled
from vitreg_recipes.data.reading import Reader
from vitreg_recipes.data.scenes import EPOCH
from vitreg_recipes.dinov2.config import DinoConfig
from vitreg_recipes.dinov2.crops import Crops, MultiCrop
from vitreg_recipes.dinov2.masks import draw_masks
from vitreg_recipes.dinov2.pictures import open_pictures

SCENE_SCALE = 2
"""Side of a scene over that of a global crop, so that crops are parts of it."""
MASKS, SCENE_CROPS = 1, 2
"""What tells apart the random numbers of a step."""


class CropData:
    """Batches of crops without end; seed, step and share decide every pixel and every mask.

    Raises:
        InputError: nothing there, or fewer images than a batch.
    """

    def __init__(self, config: DinoConfig) -> None:
        self.config = config
        self.classes: list[str] = []
        self.told = False
        self.preprocess = PreprocessConfig(image_size=config.model.image_size)
        self.crop = MultiCrop(config.data, self.preprocess)
        size, patch = config.model.size, config.model.patch_size
        self.grid = (size[0] // patch, size[1] // patch)
        self.images = 0
        self.reader: Reader | None = None
        self.skipped: set[str] = set()
        if config.data.path != SCENES:
            pictures = open_pictures(config.data.path)
            self.images = len(pictures)
            order = Shuffled(self.images, config.seed)
            self.reader = Reader(pictures, order, seed=config.seed, workers=config.data.workers)
            self.skipped = self.reader.skipped
        if self.reader is not None and self.images < config.data.batch_size:
            raise InputError(
                f"{config.data.path}: {self.images} images for data.batch_size={config.data.batch_size}; give a "
                "smaller batch, or more images"
            )

    def epoch_steps(self, share: Share) -> int:
        """Whole batches in the data; a fixed number where there is no end."""
        return EPOCH if self.reader is None else self.reader.order.epoch_steps(share)

    def batches(self, step: int, share: Share, device: torch.device) -> Iterator[Crops]:
        """Yield batches without end, from a step on."""
        reader = self.reader
        crops = self.of_scenes(step, share) if reader is None else self.of_pictures(reader, step, share, device)
        for number, (large, small) in zip(count(step), crops, strict=False):
            masks = self.masks(number, share)
            yield Crops(*(part.to(device, non_blocking=True) for part in (large, small, masks)))

    def masks(self, step: int, share: Share) -> Tensor:
        """Masks of a step; all patches where a larger teacher is distilled."""
        crops = 2 * share.size
        if self.config.teacher.source is not None:
            return torch.ones(crops, self.grid[0] * self.grid[1], dtype=torch.bool)
        loss = self.config.loss
        generator = random.Random(step_seed(self.config.seed, step, share.process, MASKS))  # noqa: S311
        wanted = loss.mask_share if loss.ibot else 0.0
        return draw_masks(crops, self.grid, generator, share=wanted, ratios=loss.mask_ratios)

    def of_scenes(self, step: int, share: Share) -> Iterator[tuple[Tensor, Tensor]]:
        """Crops of drawn scenes, each seen once."""
        side = SCENE_SCALE * self.preprocess.image_size
        for number in count(step):
            scenes = draw_scenes(share.size, (self.config.seed, number, share.process), image_size=side)
            with seeded(step_seed(self.config.seed, number, share.process, SCENE_CROPS)):
                crops = join([self.crop(to_picture(image)) for image in scenes.image])
            yield crops

    def of_pictures(self, reader: Reader, step: int, share: Share, device: torch.device) -> Iterator[tuple]:
        """Crops of pictures, read by workers."""
        for large, small, enlarged in reader.batches(self.make, join_counted, step, share, device):
            self.tell(enlarged, len(large) // 2)
            yield large, small

    def make(self, image: Image.Image, _index: int) -> tuple[tuple[Tensor, Tensor], bool]:
        """The crops of one picture, and whether it is smaller than a global one."""
        return self.crop(image), min(image.size) < self.crop.size

    def tell(self, enlarged: int, images: int) -> None:
        """Say once that images are smaller than a crop."""
        if enlarged and not self.told:
            self.told = True
            tqdm.write(
                f"{self.config.data.path}: {enlarged} of {images} images in a batch are smaller than the global crops "
                f"({self.preprocess.image_size} px) and are enlarged",
                file=sys.stderr,
            )


def join_counted(samples: list[tuple[tuple[Tensor, Tensor], bool]]) -> tuple[Tensor, Tensor, int]:
    """Crops of all pictures, and how many of these are smaller than a global crop."""
    crops, enlarged = zip(*samples, strict=True)
    return *join(list(crops)), sum(enlarged)


def join(crops: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Crops of all images, ordered by crop: the first of every image, the second of every image, ..."""
    large, small = (torch.stack(parts, dim=1) for parts in zip(*crops, strict=True))
    return large.flatten(0, 1), small.flatten(0, 1)


def to_picture(image: Float[Tensor, "3 height width"]) -> Image.Image:
    """A drawn scene as an 8-bit picture."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def step_seed(*words: int) -> int:
    """One number from several, which they all decide."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])
