"""Images without labels: scenes, or pictures of a folder, the hub or shards."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop
from tqdm import tqdm
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import Preprocess
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError

from vitreg_recipes.augment import Finish
from vitreg_recipes.config import SCENES
from vitreg_recipes.data.batch import Share
from vitreg_recipes.data.order import Shuffled
from vitreg_recipes.data.reading import Reader
from vitreg_recipes.data.scenes import EPOCH
from vitreg_recipes.dinov2.pictures import open_pictures
from vitreg_recipes.distill.config import DistillConfig


@dataclass(frozen=True)
class Pixels:
    """Images of one step, of one process."""

    images: Float[Tensor, "b 3 height width"]
    """Normalised pixels."""

    def split(self, parts: int) -> "list[Pixels]":
        """Equal parts of the batch, in order."""
        return [Pixels(part) for part in self.images.chunk(parts)]


class PixelData:
    """Batches of images without end, normalised as the model of the start expects; seed, step and share decide them.

    Raises:
        InputError: nothing there, or fewer images than a batch.
    """

    def __init__(self, config: DistillConfig, preprocess: PreprocessConfig) -> None:
        self.config = config
        self.preprocess = preprocess
        self.classes: list[str] = []
        self.told = False
        self.images = 0
        self.reader: Reader | None = None
        self.skipped: set[str] = set()
        if config.data.path == SCENES:
            return
        pictures = open_pictures(config.data.path)
        self.images = len(pictures)
        if self.images < config.data.batch_size:
            raise InputError(
                f"{config.data.path}: {self.images} images for data.batch_size={config.data.batch_size}; give a "
                "smaller batch, or more images"
            )
        self.reader = Reader(
            pictures, Shuffled(self.images, config.seed), seed=config.seed, workers=config.data.workers
        )
        self.skipped = self.reader.skipped
        self.transform = Compose(
            [
                RandomResizedCrop(
                    preprocess.image_size, scale=config.data.crop_scale, interpolation=InterpolationMode.BICUBIC
                ),
                RandomHorizontalFlip(),
                Finish(preprocess),
            ]
        )

    def epoch_steps(self, share: Share) -> int:
        """Whole batches in the data; a fixed number where there is no end."""
        return EPOCH if self.reader is None else self.reader.order.epoch_steps(share)

    def batches(self, step: int, share: Share, device: torch.device) -> Iterator[Pixels]:
        """Yield batches without end, from a step on."""
        if self.reader is None:
            yield from self.of_scenes(step, share, device)
            return
        for images, enlarged in self.reader.batches(self.make, join, step, share, device):
            self.tell(enlarged, len(images))
            yield Pixels(images)

    def of_scenes(self, step: int, share: Share, device: torch.device) -> Iterator[Pixels]:
        """Drawn scenes, each seen once."""
        preprocess, size = Preprocess(self.preprocess), self.preprocess.image_size
        for number in count(step):
            seed = (self.config.seed, number, share.process)
            yield Pixels(preprocess.normalize(draw_scenes(share.size, seed, image_size=size, device=device).image))

    def make(self, image: Image.Image, _index: int) -> tuple[Tensor, bool]:
        """A random crop of a picture, and whether the picture is smaller than that."""
        return self.transform(image), min(image.size) < self.preprocess.image_size

    def tell(self, enlarged: int, images: int) -> None:
        """Say once that pictures are smaller than the images that the model reads."""
        if enlarged and not self.told:
            self.told = True
            tqdm.write(
                f"{self.config.data.path}: {enlarged} of {images} images in a batch are smaller than "
                f"model.image_size={self.preprocess.image_size} and are enlarged",
                file=sys.stderr,
            )


def join(samples: list[tuple[Tensor, bool]]) -> tuple[Tensor, int]:
    """Images of a batch, and how many of them were enlarged."""
    images, enlarged = zip(*samples, strict=True)
    return torch.stack(images), sum(enlarged)
