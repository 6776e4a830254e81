"""Batches of labelled pictures, wherever they lie."""

from collections.abc import Iterator
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from vitreg_core.config import PreprocessConfig
from vitreg_core.errors import InputError

from vitreg_recipes.augment import Transform, training_transform
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data.batch import Batch, Share
from vitreg_recipes.data.order import Order, Repeated, Shuffled
from vitreg_recipes.data.reading import Pictures, Reader


@runtime_checkable
class Photos(Pictures, Protocol):
    """Labelled pictures that can be read in any order."""

    classes: list[str]
    """Names of the classes, in the order of the labels."""
    labels: Int[np.ndarray, " n"]
    """Class of each picture."""


class PhotoData:
    """Pictures, augmented anew each time.

    Raises:
        InputError: there is but one class.
    """

    def __init__(self, config: TrainConfig, photos: Photos) -> None:
        if len(photos.classes) < 2:
            raise InputError(f"{photos.where}: 1 class found ({photos.classes[0]}); a classifier needs at least two")
        self.photos = photos
        self.classes = photos.classes
        self.images = len(photos)
        self.preprocess = PreprocessConfig(image_size=config.model.image_size)
        self.augment = config.data.augment
        repeats = config.data.repeats
        self.order: Order = Repeated(self.images, repeats) if repeats > 1 else Shuffled(self.images, config.seed)
        self.reader = Reader(photos, self.order, seed=config.seed, workers=config.data.workers)
        self.skipped = self.reader.skipped

    def epoch_steps(self, share: Share) -> int:
        """Whole batches in an epoch, at least 1.

        Raises:
            InputError: `data.repeats` is over 1, and an epoch has not one batch.
        """
        return self.order.epoch_steps(share)

    def batches(self, step: int, share: Share, device: torch.device) -> Iterator[Batch]:
        """Read and augment batches without end, from a step on.

        Raises:
            InputError: more than half of the images cannot be read.
        """
        make = partial(self.make, training_transform(self.augment, self.preprocess))
        for images, labels in self.reader.batches(make, join, step, share, device):
            yield Batch(images, labels)

    def make(self, transform: Transform, image: Image.Image, index: int) -> tuple[Tensor, int]:
        """One augmented image and its class."""
        return transform(image), int(self.photos.labels[index])


def join(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Images and classes of a batch."""
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)
