"""What a data set on a user's disk gives: pictures read one by one, and what is known of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from vitreg_eval.results import DataRecord

IGNORE = 255
"""Class of a mask's pixels that are neither learned nor counted."""


@dataclass(frozen=True)
class Examples:
    """Pictures with classes."""

    data: DataRecord
    classes: tuple[str, ...]
    labels: Int[Tensor, " n"] | Int[Tensor, "n classes"]
    """Index into `classes`; where a picture may show several, a row of 1 (there), 0 (not there), -1 (not judged)."""
    read: Callable[[int], Image.Image]
    """The picture of an index, RGB and upright; raises InputError where it cannot be read."""
    names: Sequence[str]
    """What tells each picture in messages: a path, or a place in a file."""
    folder: Path | None = None
    """What the names are paths below; None where they are places in a file."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Pairs:
    """Pictures with a target for every pixel."""

    data: DataRecord
    read: Callable[[int], tuple[Image.Image, Tensor]]
    """Picture and target `height width` of an index, both at the size of the files.

    A mask is uint8: the class, or `IGNORE`. Depth is float32: metres, 0 where there is no reading. Raises InputError
    where a file cannot be read or does not fit.
    """
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)


def subset(examples: Examples, indices: Int[Tensor, " m"], data: DataRecord) -> Examples:
    """Some of the examples, in the order of the indices."""
    chosen = indices.tolist()
    return Examples(
        data=data,
        classes=examples.classes,
        labels=examples.labels[torch.as_tensor(chosen, dtype=torch.long)],
        read=lambda index: examples.read(chosen[index]),
        names=[examples.names[index] for index in chosen],
        folder=examples.folder,
    )
