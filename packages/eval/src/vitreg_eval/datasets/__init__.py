"""Images and targets, from a user's folder or drawn."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from vitreg_core.data.images import Preprocess, labelled_images, list_images, read_image
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError

from vitreg_eval.results import DataRecord

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
    batches: Callable[[], Iterator[Batch]]


def scenes(preprocess: Preprocess, count: int, seed: int, split: str) -> ImageSet:
    """Drawn scenes at the size a model reads; targets: label, relation, mask, depth, boxes.

    Splits and seeds never share a scene, and none is shared with training, whose seeds have three numbers.
    """
    size = preprocess.config.image_size

    def batches() -> Iterator[Batch]:
        for number, start in enumerate(range(0, count, CHUNK)):
            drawn = draw_scenes(min(CHUNK, count - start), (seed, SPLITS[split], number, 0), image_size=size)
            targets = {
                "label": drawn.label,
                "relation": drawn.relation,
                "mask": drawn.mask.to(torch.uint8),
                "depth": drawn.depth,
                "boxes": drawn.boxes,
            }
            yield Batch(preprocess.normalize(drawn.image), targets)

    record = f"scenes seed={seed} split={split} n={count} size={size}"
    return ImageSet(DataRecord(name="scenes", split=split, n=count, hash=sha256(record)), batches)


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

    def batches() -> Iterator[Batch]:
        for start in range(0, count, batch_size):
            read = []
            for path, label in zip(paths[start : start + batch_size], labels[start : start + batch_size], strict=True):
                with suppress(InputError):
                    read.append((preprocess(read_image(path)), label))
            if read:
                images, targets = zip(*read, strict=True)
                yield Batch(torch.stack(images), {"label": torch.tensor(targets)})

    return ImageSet(file_record(paths, folder, split), batches)


def photo_folder(preprocess: Preprocess, folder: Path, limit: int | None, batch_size: int) -> ImageSet:
    """All images below a folder, without targets; or `limit` of them, evenly spread.

    Raises:
        InputError: missing or empty folder; while reading, an image that cannot be read.
    """
    paths = list_images(folder)
    if limit is not None and limit < len(paths):
        paths = [paths[index * len(paths) // limit] for index in range(limit)]
    return image_files(preprocess, paths, folder, "", batch_size)


def image_files(
    preprocess: Preprocess,
    paths: list[Path],
    folder: Path,
    split: str,
    batch_size: int,
    labels: Tensor | None = None,
) -> ImageSet:
    """A set of files, prepared one by one."""

    def batches() -> Iterator[Batch]:
        for start in range(0, len(paths), batch_size):
            part = slice(start, start + batch_size)
            images = torch.stack([preprocess(read_image(path)) for path in paths[part]])
            yield Batch(images, {} if labels is None else {"label": labels[part]})

    return ImageSet(file_record(paths, folder, split), batches)


def file_record(paths: list[Path], folder: Path, split: str) -> DataRecord:
    """Record of a set of files."""
    listing = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size}" for path in paths)
    return DataRecord(name=folder.name, split=split, n=len(paths), hash=sha256(listing))


def sha256(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
