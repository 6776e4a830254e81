"""Features of an image set, computed once: kept in memory, or on disk for the next command."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float, Shaped
from torch import Tensor
from tqdm import tqdm
from vitreg_core.elastic import AutoRegisters
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone, Features

from vitreg_eval.config import ProbeOptions, TaskOptions
from vitreg_eval.datasets import Batch, ImageSet, scenes
from vitreg_eval.manifest import claim, describe, store_folder
from vitreg_eval.prefetch import ahead, in_order
from vitreg_eval.processes import Processes, processes, refuse_without_cache
from vitreg_eval.results import DataRecord
from vitreg_eval.store import Memory, Store
from vitreg_eval.tokens import Wanted, check_wanted, checked, no_class_token, run

__all__ = ["Extracted", "Wanted", "all_tokens", "extract", "in_memory", "progress", "train_and_test"]
CLS = Wanted()
TARGET = "target."
"""Before the name of a target among the arrays of a store."""
AHEAD = 2
"""Batches that are prepared before the model needs them, and that wait to be written after it."""


@dataclass(frozen=True)
class Extracted:
    """Tokens of a whole image set on the CPU, and its targets."""

    parts: dict[str, Shaped[Tensor, "n layers ..."]]
    """By name: cls and mean_patch `n layers d`, registers `n layers r d`, patches `n layers p d`; memory-mapped where
    they are kept on disk."""
    targets: dict[str, Tensor]
    data: DataRecord
    grid: tuple[int, int]
    """Rows and columns of patches."""

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    @property
    def cls(self) -> Float[Tensor, "n d"]:
        """Class tokens of the last layer, in float32.

        Raises:
            InputError: the model has none.
        """
        if "cls" not in self.parts:
            raise no_class_token()
        return self.parts["cls"][:, -1].float()

    @property
    def features(self) -> Features:
        """All tokens of the last layer, as they are kept; registers and patches must be among what was wanted."""
        cls = self.parts["cls"][:, -1] if "cls" in self.parts else None
        return Features(cls, self.parts["registers"][:, -1], self.parts["patches"][:, -1], self.grid)


def progress(image_set: ImageSet, what: str) -> Iterator[Batch]:
    """The batches of a set, with a progress bar on a terminal."""
    with tqdm(total=image_set.data.n, desc=what, unit="image", disable=None, leave=False) as bar:
        for batch in image_set.batches():
            yield batch
            bar.update(len(batch.images))


def extract(
    backbone: Backbone,
    image_set: ImageSet,
    options: TaskOptions,
    wanted: Wanted = CLS,
    cache: Path | None = None,
) -> Extracted:
    """Run a frozen backbone over an image set, or read what an earlier run kept.

    Several processes (`accelerate launch`) share the shards of a cache folder; all return all features.

    Args:
        backbone: in evaluation mode, on its device.
        image_set: the images.
        options: precision of the arithmetic, and the cache folder.
        wanted: what to keep; nothing else is held in memory.
        cache: folder to keep features in, in place of `options.cache`; in memory without any.

    Raises:
        InputError: an image cannot be read, a token is wanted that the model does not have, features are not finite or
            beyond float16, the folder holds features of another model, it cannot be written, or several processes have
            no cache folder.
    """
    check_wanted(backbone, wanted)
    folder = cache or options.cache
    if isinstance(backbone, AutoRegisters):  # which counts the images that it runs
        return in_memory(backbone, image_set, options, wanted)
    if folder is None:
        refuse_without_cache()
        return in_memory(backbone, image_set, options, wanted)
    manifest = describe(backbone, image_set, options.precision, wanted.record(backbone))
    name = f"{image_set.data.name}-{image_set.data.split}"
    store = Store(store_folder(folder, name, manifest), image_set.data.n, manifest["shard"])
    claim(store.folder, manifest)
    group = processes(cpu=backbone.device.type == "cpu")
    compute(image_set, reading(backbone, options, wanted), store, share(store, group))
    group.wait()
    return gather(store, image_set.data)


def in_memory(backbone: Backbone, image_set: ImageSet, options: TaskOptions, wanted: Wanted) -> Extracted:
    """Extract without a cache, every process for itself; arguments and errors as `extract`."""
    memory = Memory(image_set.data.n)
    compute(image_set, reading(backbone, options, wanted), memory, [range(image_set.data.n)])
    if not memory.rows:
        raise InputError(f"{image_set.data.name} {image_set.data.split}: 0 images to read; check the folder")
    return gather(memory, image_set.data)


def gather(kept: Store | Memory, data: DataRecord) -> Extracted:
    """All features that were kept."""
    arrays, grid = kept.read()
    targets = {name.removeprefix(TARGET): values for name, values in arrays.items() if name.startswith(TARGET)}
    parts = {name: values for name, values in arrays.items() if not name.startswith(TARGET)}
    return Extracted(parts, targets, data, grid)


def share(store: Store, group: Processes) -> list[range]:
    """The missing shards that this process sees to."""
    missing = store.missing()
    group.wait()  # so that all share the same ones
    return missing[group.rank :: group.size]


class Reading(NamedTuple):
    """What a pass over images keeps of them."""

    read: Callable[[Float[Tensor, "b 3 height width"]], tuple[dict[str, Tensor], tuple[int, int]]]
    """From a batch to rows by name, where the model computes them, and the grid of the patches."""
    check: Callable[[str, Tensor, int], Tensor]
    """From a name, its rows and the index of their first image to the same rows on the CPU, fit to be kept."""
    pin: bool
    """Whether batches are put where a GPU can copy from."""


def reading(backbone: Backbone, options: TaskOptions, wanted: Wanted) -> Reading:
    """The wanted tokens of a backbone."""
    return Reading(
        read=lambda images: run(backbone, images, options.precision, wanted),
        check=lambda name, values, start: checked(name, values, wanted.dtype, start),
        pin=backbone.device.type == "cuda",
    )


def compute(image_set: ImageSet, reading: Reading, kept: Store | Memory, spans: list[range]) -> None:
    """Read some shards of images and keep what is wanted; loading and keeping go on while the model computes."""

    def computed() -> Iterator[tuple[Place, dict[str, Tensor], tuple[int, int], dict[str, Tensor]]]:
        for place, batch in ahead(located(image_set, spans, pin=reading.pin), AHEAD):
            yield place, *reading.read(batch.images), batch.targets

    def keep(found: tuple[Place, dict[str, Tensor], tuple[int, int], dict[str, Tensor]]) -> int:
        place, values, grid, targets = found
        rows = {name: reading.check(name, value, place.start) for name, value in values.items()}
        rows |= {TARGET + name: value for name, value in targets.items()}
        kept.put(place.start, place.span, rows, grid)
        return len(next(iter(rows.values())))

    total, what = sum(map(len, spans)), f"features of {image_set.data.name} {image_set.data.split}"
    with tqdm(total=total, desc=what, unit="image", disable=None, leave=False) as bar:
        for count in in_order(keep, computed(), threads=1, ahead=AHEAD):
            bar.update(count)


class Place(NamedTuple):
    """Where a batch is in its set."""

    start: int
    """Index of its first image."""
    span: range
    """The images of its shard."""


def located(image_set: ImageSet, spans: list[range], *, pin: bool) -> Iterator[tuple[Place, Batch]]:
    """The batches of some shards and their places; in memory that a GPU can copy from, if asked."""
    for span in spans:
        start = span.start
        for batch in image_set.batches(span.start, span.stop):
            yield Place(start, span), Batch(batch.images.pin_memory(), batch.targets) if pin else batch
            start += len(batch.images)


def train_and_test(
    backbone: Backbone, options: ProbeOptions, wanted: Wanted | None = None
) -> tuple[Extracted, Extracted]:
    """Features of drawn scenes to train on and to report on, as many as the options say.

    Args:
        backbone: as for `extract`.
        options: how many scenes, and as for `extract`.
        wanted: what to keep; all tokens if None.

    Raises:
        InputError: as `extract`.
    """
    wanted = wanted or all_tokens(backbone)
    counts = {"train": options.train_images, "test": options.test_images}
    train, test = (scenes(backbone.preprocess, count, options.seed, split) for split, count in counts.items())
    return extract(backbone, train, options, wanted), extract(backbone, test, options, wanted)


def all_tokens(backbone: Backbone) -> Wanted:
    """Every token of the last layer, as `Extracted.features` needs them."""
    return Wanted(parts=("cls", "registers", "patches") if "cls" in backbone.prefix else ("registers", "patches"))
