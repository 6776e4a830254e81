"""Pictures read and changed by workers, for every signal. Seed, step and share decide a batch, whoever reads it."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from vitreg_core.data.images import cut_ends
from vitreg_core.errors import InputError

from vitreg_recipes.augment import seed_generators, seeded
from vitreg_recipes.data.batch import Share
from vitreg_recipes.data.order import Order, Steps

Make = Callable[[Image.Image, int], Any]
"""From a picture and its index to a sample, drawing from the global generators of the CPU."""
Join = Callable[[list[Any]], tuple[Any, ...]]
"""From the samples of a batch to its tensors, and whatever else is told of it."""


@runtime_checkable
class Pictures(Protocol):
    """Pictures that can be read in any order."""

    where: str
    """Where they lie, for messages."""

    def __len__(self) -> int:
        """How many there are."""

    def name(self, index: int) -> str:
        """What a user knows a picture by."""

    def read(self, index: int) -> Image.Image:
        """Read a picture as RGB, upright.

        Raises:
            InputError: it cannot be read.
        """


class Reader:
    """Batches of pictures without end. What cannot be read is named once, and the next picture takes its place."""

    def __init__(self, pictures: Pictures, order: Order, *, seed: int, workers: int) -> None:
        self.pictures = pictures
        self.order = order
        self.seed = seed
        self.workers = workers
        self.skipped: set[str] = set()
        """Names of the unreadable pictures met so far."""

    def batches(self, make: Make, join: Join, step: int, share: Share, device: torch.device) -> Iterator[tuple]:
        """Read, change and join batches without end, from a step on; tensors are on the device.

        Raises:
            InputError: more than half of the pictures cannot be read.
        """
        loader = DataLoader(
            Samples(self.pictures, make, join, self.seed),
            batch_sampler=Steps(self.order, step, share),
            collate_fn=as_it_is,
            num_workers=self.workers,
            worker_init_fn=end_with_parent_only,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from the generator of the training
        )
        for joined, skipped in loader:
            self.report(skipped)
            yield tuple(part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in joined)

    def report(self, skipped: list[str]) -> None:
        """Name every unreadable picture once, and give up when they are too many."""
        for name in dict.fromkeys(skipped):
            if name not in self.skipped:
                self.skipped.add(name)
                tqdm.write(f"{name}: not a readable image, the next one takes its place", file=sys.stderr)
        if 2 * len(self.skipped) > len(self.pictures):
            raise InputError(
                f"{self.pictures.where}: {len(self.skipped)} of {len(self.pictures)} images cannot be read, such as "
                f"{min(self.skipped)}; mend or remove them"
            )


class Samples(Dataset[Any]):
    """Samples by (place in the run, index): each place has randomness of its own, so copies differ."""

    def __init__(self, pictures: Pictures, make: Make, join: Join, seed: int) -> None:
        self.pictures = pictures
        self.make = make
        self.join = join
        self.seed = seed

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[tuple[Any, ...], list[str]]:
        """A batch, and the unreadable pictures that others stand in for; the generators are put back at the end."""
        skipped: list[str] = []
        with seeded(self.seed):
            samples = [self.read(place, index, skipped) for place, index in keys]
        return self.join(samples), skipped

    def read(self, place: int, index: int, skipped: list[str]) -> Any:  # noqa: ANN401 (what `make` gives)
        """Read and change one picture, or the next one that can be read."""
        for _ in range(len(self.pictures) // 2 + 1):
            try:
                image = cut_ends(self.pictures.read(index))
                seed_generators(self.seed, place)
                return self.make(image, index)
            except InputError:
                skipped.append(self.pictures.name(index))
                index = (index + 1) % len(self.pictures)
        return self.make(Image.new("RGB", (8, 8)), index)  # which `report` refuses


def as_it_is(batch: Any) -> Any:  # noqa: ANN401 (what `Samples` joined)
    """The batch, which needs no collation."""
    return batch


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
