"""Batches of labelled pictures, wherever they lie. Seed, step and share decide every pixel, whichever worker reads."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import cut_ends
from vitreg_core.errors import InputError

from vitreg_recipes.augment import Transform, seed_generators, seeded, training_transform
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data.batch import Batch, Share
from vitreg_recipes.data.order import Order, Repeated, Shuffled, Steps


@runtime_checkable
class Photos(Protocol):
    """Labelled pictures that can be read in any order."""

    where: str
    """Where they lie, for messages."""
    classes: list[str]
    """Names of the classes, in the order of the labels."""
    labels: Int[np.ndarray, " n"]
    """Class of each picture."""

    def name(self, index: int) -> str:
        """What a user knows a picture by."""

    def read(self, index: int) -> Image.Image:
        """Read a picture as RGB, upright.

        Raises:
            InputError: it cannot be read.
        """


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
        self.images = len(photos.labels)
        self.skipped: set[str] = set()
        self.preprocess = PreprocessConfig(image_size=config.model.image_size)
        self.augment = config.data.augment
        self.seed = config.seed
        self.workers = config.data.workers
        repeats = config.data.repeats
        self.order: Order = Repeated(self.images, repeats) if repeats > 1 else Shuffled(self.images, config.seed)

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
        transform = training_transform(self.augment, self.preprocess)
        loader = DataLoader(
            Samples(self.photos, transform, self.preprocess.image_size, self.seed),
            batch_sampler=Steps(self.order, step, share),
            collate_fn=collate,
            num_workers=self.workers,
            worker_init_fn=end_with_parent_only,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from the generator of the training
        )
        for images, labels, skipped in loader:
            report(skipped, self.skipped, self.photos.where, self.images)
            yield Batch(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))


def report(met: list[str], skipped: set[str], where: str, images: int) -> None:
    """Name every unreadable image once, and give up when they are too many.

    Args:
        met: names of those in a batch.
        skipped: those met so far; they are added.
        where: where the images lie.
        images: how many there are.

    Raises:
        InputError: over half cannot be read.
    """
    for name in dict.fromkeys(met):
        if name not in skipped:
            skipped.add(name)
            tqdm.write(f"{name}: not a readable image, the next one takes its place", file=sys.stderr)
    if 2 * len(skipped) > images:
        raise InputError(
            f"{where}: {len(skipped)} of {images} images cannot be read, such as {min(skipped)}; mend or remove them"
        )


class Sample(NamedTuple):
    """One augmented image, its class, and the unreadable files that it stands in for."""

    image: Tensor
    label: int
    skipped: list[str]


class Samples(Dataset[Sample]):
    """Augmented images by (place in the run, index): each place has randomness of its own, so copies differ."""

    def __init__(self, photos: Photos, transform: Transform, size: int, seed: int) -> None:
        self.photos = photos
        self.transform = transform
        self.size = size
        self.seed = seed

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample]:
        """The samples of a batch; the generators are put back once, after all of them."""
        with seeded(self.seed):
            return [self.read(place, index) for place, index in keys]

    def read(self, place: int, index: int) -> Sample:
        """Read and augment one image, or the next one that can be read."""
        skipped: list[str] = []
        while 2 * len(skipped) <= len(self.photos.labels):
            try:
                image = cut_ends(self.photos.read(index))
            except InputError:
                skipped.append(self.photos.name(index))
                index = (index + 1) % len(self.photos.labels)
                continue
            seed_generators(self.seed, place)
            return Sample(self.transform(image), int(self.photos.labels[index]), skipped)
        return Sample(torch.zeros(3, self.size, self.size), 0, skipped)  # which `report` refuses


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """Join samples into a batch."""
    skipped = [name for sample in samples for name in sample.skipped]
    return torch.stack([sample.image for sample in samples]), torch.tensor([s.label for s in samples]), skipped


def end_with_parent_only(_worker: int) -> None:
    """Make a worker ignore the SIGTERM and Ctrl-C that schedulers and terminals send to every process of a job.

    The training process saves first, and then ends its workers itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait_for_parent, daemon=True).start()


def wait_for_parent() -> None:
    """End this process at the first SIGTERM that its parent sends."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
