"""Results that grow batch by batch: sums whose memory does not depend on the number of images."""

from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from vitreg_core.errors import InputError

S = TypeVar("S", bound="Sums")


@dataclass(frozen=True)
class Sums:
    """What several batches give together: `first + second` adds every field, so that parts join in any order."""

    def __add__(self: S, other: S) -> S:
        """The sums over the images of both.

        Raises:
            InputError: batches of other shapes, as images of several sizes give.
        """
        mine, theirs = vars(self), vars(other)
        for name, value in mine.items():
            if isinstance(value, torch.Tensor) and value.shape != theirs[name].shape:
                raise InputError(
                    f"{name} of shapes {tuple(value.shape)} and {tuple(theirs[name].shape)} do not add up; "
                    "give images of one size and one model at a time"
                )
        return type(self)(**{field.name: mine[field.name] + theirs[field.name] for field in fields(self)})
