"""What training knows of its data: batches without end, from any step on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from vitreg_core.config import PreprocessConfig


@dataclass(frozen=True)
class Batch:
    """Images of one step, of one process."""

    images: Float[Tensor, "b 3 height width"]
    """Normalised pixels."""
    labels: Int[Tensor, " b"]
    """Class indices."""

    def split(self, parts: int) -> "list[Batch]":
        """Equal parts of the batch, in order."""
        return [Batch(*part) for part in zip(self.images.chunk(parts), self.labels.chunk(parts), strict=True)]


class Share(NamedTuple):
    """The part of every batch that falls to one process."""

    size: int
    """Images per step in each process."""
    process: int
    """Number of this process, from 0."""
    processes: int
    """Number of processes."""

    def first_place(self, step: int) -> int:
        """Place in the whole run of this process's first image of a step."""
        return (step * self.processes + self.process) * self.size


@runtime_checkable
class Data(Protocol):
    """Batches, and what the model must know of them."""

    classes: list[str]
    """Names of the classes, in the order of the labels."""
    images: int
    """Number of images; 0 when they are drawn without end."""
    preprocess: PreprocessConfig
    """What the trained model expects of an image."""
    skipped: set[str]
    """Names of the unreadable images met so far."""

    def epoch_steps(self, share: Share) -> int:
        """Steps of an epoch, at least 1."""

    def batches(self, step: int, share: Share, device: torch.device) -> Iterator[Any]:
        """Yield batches without end, from a step on; what is in them is between the data and the signal."""
