"""Which image stands where in a run. It follows from the step alone, so a run can continue at any step."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import Sampler
from vitreg_core.errors import InputError

from vitreg_recipes.data.batch import Share

ROUND = 256
"""DeiT counts the images of an epoch in whole batches of this size."""
Files = Int[np.ndarray, " b"]


@runtime_checkable
class Order(Protocol):
    """The images of every batch of every process, by their index."""

    def epoch_steps(self, share: Share) -> int:
        """Steps of an epoch, at least 1."""

    def files(self, step: int, share: Share) -> Files:
        """Images of one step of one process."""


class Shuffled:
    """Every image once an epoch, in a new order; a batch may reach from one epoch into the next.

    The steps of an epoch are rounded down, as where incomplete batches are dropped; but none is dropped here.
    """

    def __init__(self, images: int, seed: int) -> None:
        self.images = images
        self.seed = seed
        self.epoch = lru_cache(maxsize=2)(self.draw_epoch)

    def epoch_steps(self, share: Share) -> int:
        """Whole batches in the data, at least 1."""
        return max(1, self.images // (share.size * share.processes))

    def files(self, step: int, share: Share) -> Files:
        """Images of one step of one process; the batches of all processes, side by side, are one large batch."""
        first = share.first_place(step)
        places = (divmod(place, self.images) for place in range(first, first + share.size))
        return np.array([self.epoch(epoch)[place] for epoch, place in places])

    def draw_epoch(self, epoch: int) -> np.ndarray:
        """Order of the images in an epoch."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.images)


class Repeated:
    """Repeated augmentation (Hoffer et al. 2020) as in DeiT: images several times in a row, dealt to the processes.

    An epoch has as many places as the data have images, in whole batches of 256, so of n images repeated k times it
    meets the first n / k of the epoch's order; and it drops its last incomplete batch. The order depends on the epoch
    alone, not on the seed, as in DeiT and timm.

    Raises:
        InputError: an epoch has not one batch.
    """

    def __init__(self, images: int, repeats: int) -> None:
        self.images = images
        self.repeats = repeats
        self.epoch = lru_cache(maxsize=2)(self.draw_epoch)

    def epoch_steps(self, share: Share) -> int:
        """Whole batches in an epoch of one process."""
        whole = self.images // ROUND * ROUND
        places = whole // share.processes if whole else -(-self.images // share.processes)  # few images: rounded up
        if places < share.size:
            raise InputError(
                f"data.batch_size={share.size * share.processes} with data.repeats={self.repeats}: an epoch of "
                f"{self.images} images has {places} per process, less than a batch; give a smaller batch, or repeats=1"
            )
        return places // share.size

    def files(self, step: int, share: Share) -> Files:
        """Images of one step of one process; the copies of an image go to neighbouring processes."""
        epoch, number = divmod(step, self.epoch_steps(share))
        places = (number * share.size + np.arange(share.size)) * share.processes + share.process
        return self.epoch(epoch)[places % (self.images * self.repeats) // self.repeats]

    def draw_epoch(self, epoch: int) -> np.ndarray:
        """Order of the images in an epoch, before they are repeated."""
        return torch.randperm(self.images, generator=torch.Generator().manual_seed(epoch)).numpy()


class Steps(Sampler[list[tuple[int, int]]]):
    """The (place in the run, image) pairs of every batch of one process, from a step on, without end."""

    def __init__(self, order: Order, step: int, share: Share) -> None:
        self.order = order
        self.step = step
        self.share = share

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in count(self.step):
            files = self.order.files(number, self.share).tolist()
            yield list(enumerate(files, start=self.share.first_place(number)))
