"""Images and targets, from a user's folder or drawn."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from vitreg_core.data.images import Preprocess, labelled_images, list_images, read_image
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.prefetch import READERS, in_order
from vitreg_eval.results import DataRecord

T = TypeVar("T")
SPLITS = {"train": 1, "test": 2}
CHUNK = 64  # scenes drawn at a time; a constant, so that a scene does not depend on the batch size


@dataclass(frozen=True)
class Batch:
    """Images as a model reads them, with whatever targets there are."""

    images: Float[Tensor, "b 3 height width"]
    targets: dict[str, Tensor]


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set, in batches, the same every time."""

    data: DataRecord
    part: Callable[[int, int], Iterator[Batch]]
    """Batches of the images from one index up to another."""
    prepared: Mapping[str, Any] | None = None
    """All that the images depend on beside the data: the preprocessing. None where an image may be missing from the
    batches; the features of such a set are not kept on disk."""

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches of the images from `start` up to `stop`; all by default."""
        return self.part(start, self.data.n if stop is None else min(stop, self.data.n))


def scenes(preprocess: Preprocess, count: int, seed: int, split: str) -> ImageSet:
    """Drawn scenes at the size a model reads; targets: label, relation, mask, depth, boxes.

    Splits and seeds never share a scene, and none is shared with training, whose seeds have three numbers.
    """
    size = preprocess.config.image_size

    def part(begin: int, end: int) -> Iterator[Batch]:
        for number in range(begin // CHUNK, -(-end // CHUNK)):
            start = number * CHUNK
            drawn = draw_scenes(min(CHUNK, count - start), (seed, SPLITS[split], number, 0), image_size=size)
            targets = {
                "label": drawn.label,
                "relation": drawn.relation,
                "mask": drawn.mask.to(torch.uint8),
                "depth": drawn.depth,
                "boxes": drawn.boxes,
            }
            rows = slice(max(begin - start, 0), end - start)
            images = preprocess.normalize(drawn.image[rows])
            yield Batch(images, {name: values[rows] for name, values in targets.items()})

    record = f"scenes seed={seed} split={split} n={count} size={size}"
    return ImageSet(DataRecord(name="scenes", split=split, n=count, hash=sha256(record)), part, prepared(preprocess))


def labelled_folder(preprocess: Preprocess, folder: Path, split: str, batch_size: int) -> ImageSet:
    """Images in one sub-folder per class; target: label.

    Raises:
        InputError: missing or empty folder; while reading, an image that cannot be read.
    """
    found = labelled_images(folder / split if split else folder)
    return image_files(preprocess, found.paths, folder, split, batch_size, torch.tensor(found.labels))


def readable_sample(preprocess: Preprocess, folder: Path, split: str, batch_size: int, most: int) -> ImageSet:
    """At most so many images of a labelled folder, evenly spread over it; what cannot be read is left out.

    Raises:
        InputError: missing or empty folder.
    """
    found = labelled_images(folder / split)
    count = min(most, len(found))
    chosen = [index * len(found) // count for index in range(count)]
    paths, labels = [found.paths[index] for index in chosen], [found.labels[index] for index in chosen]

    def prepare(index: int) -> tuple[Tensor, int] | None:
        with suppress(InputError):
            return preprocess(read_image(paths[index])), labels[index]
        return None

    def part(start: int, stop: int) -> Iterator[Batch]:
        for read in grouped(prepare, start, stop, batch_size):
            there = [pair for pair in read if pair is not None]
            if there:
                images, targets = zip(*there, strict=True)
                yield Batch(torch.stack(images), {"label": torch.tensor(targets)})

    return ImageSet(file_record(paths, folder, split), part)


def photo_folder(preprocess: Preprocess, folder: Path, limit: int | None, batch_size: int) -> ImageSet:
    """All images below a folder, without targets; or `limit` of them, evenly spread.

    Raises:
        InputError: missing or empty folder; while reading, an image that cannot be read.
    """
    return image_files(preprocess, spread(list_images(folder), limit), folder, "", batch_size)


@dataclass(frozen=True)
class TolerantSet:
    """Images of which some may be unreadable: their rows are zeros, and the target `readable` says so."""

    images: ImageSet
    names: list[str]
    """What a user knows each image by; empty for drawn ones."""


def tolerant_folder(
    preprocess: Preprocess, folder: Path, limit: int | None, batch_size: int, *, half: int | None = None
) -> TolerantSet:
    """All images below a folder, or `limit` of them, evenly spread; target: readable.

    Args:
        preprocess: how the model reads images.
        folder: where they lie, at any depth.
        limit: at most so many.
        batch_size: images per batch.
        half: 0 for the first of every two images, 1 for the second; all of them by default.

    Raises:
        InputError: missing or empty folder, or one image that cannot be halved.
    """
    found = list_images(folder)
    if half is not None and len(found) < 2:
        raise InputError(f"{folder}: 1 image, of which half are to be calibrated on; give more")
    paths = spread(found if half is None else found[half::2], limit)
    size = preprocess.config.image_size

    def prepare(index: int) -> Tensor | None:
        with suppress(InputError):
            return preprocess(read_image(paths[index]))
        return None

    def part(start: int, stop: int) -> Iterator[Batch]:
        for read in grouped(prepare, start, stop, batch_size):
            images = torch.stack([torch.zeros(3, size, size) if image is None else image for image in read])
            yield Batch(images, {"readable": torch.tensor([image is not None for image in read])})

    image_set = ImageSet(file_record(paths, folder, ""), part, prepared(preprocess))
    return TolerantSet(image_set, [path.relative_to(folder).as_posix() for path in paths])


def spread(items: list[T], most: int | None) -> list[T]:
    """All items, or so many of them, evenly spread."""
    if most is None or most >= len(items):
        return items
    return [items[index * len(items) // most] for index in range(most)]


def image_files(
    preprocess: Preprocess,
    paths: list[Path],
    folder: Path,
    split: str,
    batch_size: int,
    labels: Tensor | None = None,
) -> ImageSet:
    """A set of files, prepared one by one."""

    def part(start: int, stop: int) -> Iterator[Batch]:
        for begin, images in stacked(lambda index: preprocess(read_image(paths[index])), start, stop, batch_size):
            rows = slice(begin, begin + len(images))
            yield Batch(images, {} if labels is None else {"label": labels[rows]})

    return ImageSet(file_record(paths, folder, split), part, prepared(preprocess))


def image_set(examples: Examples, preprocess: Preprocess, batch_size: int) -> ImageSet:
    """Pictures with classes as a model reads them; target: label, as in `examples.labels`.

    Pictures are read in several threads, `batch_size` or more ahead. Reading raises InputError where one cannot be.
    """

    def part(start: int, stop: int) -> Iterator[Batch]:
        for begin, images in stacked(lambda index: preprocess(examples.read(index)), start, stop, batch_size):
            yield Batch(images, {"label": examples.labels[begin : begin + len(images)]})

    return ImageSet(examples.data, part, prepared(preprocess))


def stacked(
    prepare: Callable[[int], Tensor], start: int, stop: int, batch_size: int
) -> Iterator[tuple[int, Float[Tensor, "b 3 height width"]]]:
    """Prepared images in batches, each with the index of its first."""
    for number, images in enumerate(grouped(prepare, start, stop, batch_size)):
        yield start + number * batch_size, torch.stack(images)


def grouped(prepare: Callable[[int], T], start: int, stop: int, batch_size: int) -> Iterator[list[T]]:
    """What is prepared of each index, in lists of a batch; the threads that prepare are a batch or more ahead."""
    read = in_order(prepare, range(start, stop), threads=READERS, ahead=max(batch_size, READERS))
    while batch := list(islice(read, batch_size)):
        yield batch


def prepared(preprocess: Preprocess) -> dict[str, Any]:
    """What is done to an image, in plain values."""
    return preprocess.config.model_dump(mode="json")


def file_record(paths: list[Path], folder: Path, split: str) -> DataRecord:
    """Record of a set of files."""
    listing = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size}" for path in paths)
    return DataRecord(name=folder.name, split=split, n=len(paths), hash=sha256(listing))


def sha256(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
