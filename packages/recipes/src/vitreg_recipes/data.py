"""Batches to train on. A batch depends on the seed and the step alone, so a run continues exactly where it stopped."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import LabelledImages, Preprocess, labelled_images, read_image
from vitreg_core.data.scenes import SHAPES, TEXTURES, draw_scenes
from vitreg_core.errors import InputError

from vitreg_recipes.augment import seeded, three_augment
from vitreg_recipes.config import SCENES, TrainConfig


@dataclass(frozen=True)
class Batch:
    """Images of one step, of one process."""

    images: Float[Tensor, "b 3 height width"]
    """Normalised pixels."""
    labels: Int[Tensor, " b"]
    """Class indices."""


class Share(NamedTuple):
    """The part of every batch that falls to one process."""

    size: int
    """Images per step in each process."""
    process: int
    """Number of this process, from 0."""
    processes: int
    """Number of processes."""


@runtime_checkable
class Data(Protocol):
    """What training knows of its data."""

    classes: list[str]
    """Names of the classes, in the order of the labels."""
    images: int
    """Number of images; 0 when they are drawn without end."""
    preprocess: PreprocessConfig
    """What the trained model expects of an image."""
    skipped: set[str]
    """Paths of the unreadable images met so far."""

    def batches(self, step: int, share: Share, device: torch.device) -> Iterator[Batch]:
        """Yield batches without end, from a step on."""


def open_data(config: TrainConfig) -> Data:
    """Find the data of a run.

    Raises:
        InputError: no such folder, or no images in it.
    """
    return SceneData(config) if config.data.path == SCENES else FolderData(config)


class SceneData:
    """Drawn scenes, each seen once. They are not augmented: a flip would falsify what captions say of them."""

    def __init__(self, config: TrainConfig) -> None:
        self.label = config.data.label
        pairs = [f"{texture}, {shape}" for texture in TEXTURES for shape in SHAPES]
        self.classes = pairs if self.label == "relation" else list(TEXTURES)
        self.images = 0
        self.skipped: set[str] = set()
        size = config.model.image_size
        self.preprocess = PreprocessConfig(image_size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        self.seed = config.seed

    def batches(self, step: int, share: Share, device: torch.device) -> Iterator[Batch]:
        """Draw batches without end, from a step on."""
        preprocess = Preprocess(self.preprocess)
        for number in count(step):
            seed = (self.seed, number, share.process)
            scenes = draw_scenes(share.size, seed, image_size=self.preprocess.image_size, device=device)
            labels = scenes.relation if self.label == "relation" else scenes.label
            yield Batch(preprocess.normalize(scenes.image), labels)


class FolderData:
    """Labelled image files, in a new order every epoch; a batch may reach from one epoch into the next."""

    def __init__(self, config: TrainConfig) -> None:
        folder = Path(config.data.path)
        self.folder = folder / "train" if (folder / "train").is_dir() else folder
        self.files = labelled_images(self.folder)
        self.classes = self.files.classes
        self.images = len(self.files)
        self.skipped: set[str] = set()
        self.preprocess = PreprocessConfig(image_size=config.model.image_size)
        self.seed = config.seed
        self.workers = config.data.workers

    def batches(self, step: int, share: Share, device: torch.device) -> Iterator[Batch]:
        """Read and augment batches without end, from a step on.

        Raises:
            InputError: more than half of the images cannot be read.
        """
        loader = DataLoader(
            Samples(self.files, self.preprocess, self.seed),
            batch_sampler=Steps(self.images, self.seed, step, share),
            collate_fn=collate,
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from the generator of the training
        )
        for images, labels, skipped in loader:
            self.report(skipped)
            yield Batch(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))

    def report(self, skipped: list[str]) -> None:
        """Name every unreadable image once, and give up when they are too many."""
        for path in dict.fromkeys(skipped):
            if path not in self.skipped:
                self.skipped.add(path)
                tqdm.write(f"{path}: not a readable image, the next one takes its place", file=sys.stderr)
        if 2 * len(self.skipped) > self.images:
            raise InputError(
                f"{self.folder}: {len(self.skipped)} of {self.images} images cannot be read, such as "
                f"{min(self.skipped)}; mend or remove them"
            )


class Sample(NamedTuple):
    """One augmented image, its class, and the unreadable files that it stands in for."""

    image: Tensor
    label: int
    skipped: list[str]


class Samples(Dataset[Sample]):
    """Augmented images by place in the run: place and file decide every pixel, whichever worker reads them."""

    def __init__(self, files: LabelledImages, preprocess: PreprocessConfig, seed: int) -> None:
        self.files = files
        self.transform = three_augment(preprocess)
        self.size = preprocess.image_size
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        place, index = key
        skipped: list[str] = []
        while 2 * len(skipped) <= len(self.files):
            path = self.files.paths[index]
            try:
                image = read_image(path)
            except InputError:
                skipped.append(str(path))
                index = (index + 1) % len(self.files)
                continue
            with seeded(self.seed, place):
                return Sample(self.transform(image), self.files.labels[index], skipped)
        return Sample(torch.zeros(3, self.size, self.size), 0, skipped)  # which `report` refuses


class Steps(Sampler[list[tuple[int, int]]]):
    """The (place, file) pairs of every batch of one process, from a step on, without end."""

    def __init__(self, images: int, seed: int, step: int, share: Share) -> None:
        self.images = images
        self.seed = seed
        self.step = step
        self.share = share

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = lru_cache(maxsize=2)(self.order)
        for number in count(self.step):
            first = (number * self.share.processes + self.share.process) * self.share.size
            places = [divmod(place, self.images) for place in range(first, first + self.share.size)]
            yield [(epoch * self.images + place, int(order(epoch)[place])) for epoch, place in places]

    def order(self, epoch: int) -> np.ndarray:
        """Order of the files in an epoch."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.images)


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """Join samples into a batch."""
    skipped = [path for sample in samples for path in sample.skipped]
    return torch.stack([sample.image for sample in samples]), torch.tensor([s.label for s in samples]), skipped
