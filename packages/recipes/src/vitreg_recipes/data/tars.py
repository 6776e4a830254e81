"""Images inside tar files: one tar per class, or shards of key.jpg with key.cls or key.json.

Where every image lies is found once, by reading all headers, and kept in the cache folder. From then on any image is
read by its place, so shards are as good as files: order, resuming and sharing out know nothing of them.
"""

import hashlib
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int
from PIL import Image
from tqdm import tqdm
from vitreg_core.data.images import SUFFIXES, decode_image
from vitreg_core.errors import InputError
from vitreg_core.weights.download import cache_folder

N = TypeVar("N", bound=Any)  # a named tuple
LABEL_NAMES = ("label", "cls")
"""Entries of a key.json, and columns of a table, that hold the class."""
LABEL_SUFFIXES = (".cls", ".json")
"""Files of a shard that hold the class."""


class Member(NamedTuple):
    """One image inside a tar."""

    key: str
    offset: int
    """First byte."""
    size: int
    """Bytes."""
    label: str
    """Name or number of its class."""


class Index(NamedTuple):
    """Where all images lie."""

    shards: Int[np.ndarray, " n"]
    """Which tar holds each image."""
    offsets: Int[np.ndarray, " n"]
    """First byte of each image."""
    sizes: Int[np.ndarray, " n"]
    """Bytes of each image."""
    labels: Int[np.ndarray, " n"]
    """Class of each image."""
    classes: np.ndarray
    """Names of the classes."""


class TarPhotos:
    """Images inside tar files.

    Args:
        where: what was asked for, for messages.
        shards: the tar files, in order.
        labelled: whether each image has its label beside it; else each tar is a class.

    Raises:
        InputError: a tar is damaged, holds no image, or its images have no label.
    """

    def __init__(self, where: str, shards: list[Path], *, labelled: bool) -> None:
        index = cached_index(shards, labelled=labelled)
        self.where = where
        self.shards = shards
        self.index = index
        self.labels = index.labels
        self.classes: list[str] = index.classes.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Tar and member."""
        return member_name(self.shards[self.index.shards[index]], self.index.offsets[index])

    def read(self, index: int) -> Image.Image:
        """Read an image by its place in its tar.

        Raises:
            InputError: it cannot be read.
        """
        shard = self.shards[self.index.shards[index]]
        return decode_image(read_bytes(shard, self.index.offsets[index], self.index.sizes[index]), str(shard))


def read_bytes(shard: Path, offset: int | np.integer, size: int | np.integer) -> bytes:
    """Read a member by its place.

    Raises:
        InputError: the tar cannot be read.
    """
    try:
        with shard.open("rb") as file:
            file.seek(int(offset))
            return file.read(int(size))
    except OSError as error:
        raise InputError(f"{shard}: cannot be read ({error})") from None


def member_name(shard: Path, offset: int | np.integer) -> str:
    """Tar and member; looked up in the tar, as only damaged ones are asked for."""
    with tarfile.open(shard, "r:") as archive:
        names = (member.name for member in archive if member.offset_data == offset)
        return f"{shard}/{next(names, f'byte {offset}')}"


def cached_index(shards: list[Path], *, labelled: bool) -> Index:
    """The index of some tars: from the cache if none has changed since, else made and kept there."""
    return cached(Index, shards, labelled, lambda: make_index(shards, labelled=labelled))


def cached(kind: Callable[..., N], shards: list[Path], how: object, make: Callable[[], N]) -> N:
    """What the headers of some tars say, as arrays: from the cache if no tar has changed since, else made and kept.

    Args:
        kind: a named tuple of arrays.
        shards: the tars.
        how: what else decides about the result; JSON.
        make: makes it.
    """
    known = [(str(shard.resolve()), shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    name = hashlib.sha256(json.dumps([known, how]).encode()).hexdigest()[:32]
    file = cache_folder() / "shards" / f"{name}.npz"
    with suppress(OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile), np.load(file) as kept:
        return kind(**{field: kept[field] for field in kept.files})
    found = make()
    with suppress(OSError):  # a cache that cannot be written costs time alone
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{name}.{os.getpid()}.npz")
        np.savez(temporary, **found._asdict())
        temporary.replace(file)
    return found


def make_index(shards: list[Path], *, labelled: bool) -> Index:
    """Read the headers of all tars."""
    parts: list[np.ndarray] = []
    codes: dict[str, int] = {}
    for number, shard in enumerate(tqdm(shards, "reading the headers of the tars", unit="tar", disable=None)):
        images = labelled_images(shard) if labelled else class_images(shard)
        if not images:
            raise InputError(f"{shard}: 0 images found; it must hold files such as {', '.join(sorted(SUFFIXES))}")
        rows = [(number, image.offset, image.size, codes.setdefault(image.label, len(codes))) for image in images]
        parts.append(np.array(rows).T)
    shard_of, offsets, sizes, labels = np.concatenate(parts, axis=1)
    classes, places = number_classes(list(codes))
    return Index(shard_of.astype(np.int32), offsets, sizes.astype(np.int32), places[labels], np.array(classes))


SPARE_CLASSES = 1000
"""Classes without images that numbered labels may leave."""


def number_classes(names: list[str]) -> tuple[list[str], Int[np.ndarray, " names"]]:
    """Names of the classes, and the class of each different label: numbers stay, names are sorted."""
    if all(name.isdecimal() for name in names):
        numbers = np.array([int(name) for name in names])
        refuse_wide(numbers)
        return [str(number) for number in range(numbers.max() + 1)], numbers
    classes, places = np.unique(names, return_inverse=True)
    return classes.tolist(), places


def refuse_wide(numbers: np.ndarray) -> None:
    """Refuse numbers that are names rather than places in a list, for which the head would be far too wide.

    Raises:
        InputError: names the largest.
    """
    if numbers.max() > SPARE_CLASSES + 100 * len(np.unique(numbers)):
        raise InputError(
            f"label {numbers.max()} among {len(np.unique(numbers))} different ones: numbers are classes from 0 on; "
            "number the classes so, or give them names"
        )


def class_images(shard: Path) -> list[Member]:
    """Images of a tar that is a class, sorted by name."""
    images = []
    for member, _ in members(shard):
        suffix = Path(member.name).suffix.lower()
        if suffix == ".cls":
            raise InputError(
                f"{shard}: holds labels ({member.name}), so it is a shard, not a class; "
                f"give the shards as a pattern: '{shard.parent}/*.tar'"
            )
        if suffix in SUFFIXES:
            images.append(Member(member.name, member.offset_data, member.size, shard.stem))
    return sorted(images)


def labelled_images(shard: Path) -> list[Member]:
    """Images of a shard with the labels beside them, in its order (webdataset: the key ends at the first dot)."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}
    for member, text in members(shard):
        key, suffix = split_key(member.name)
        if suffix in SUFFIXES:
            images.setdefault(key, member)
        label = read_label(suffix, text)
        if label:
            labels[key] = label
    unlabelled = [key for key in images if key not in labels]
    if unlabelled:
        raise InputError(
            f"{shard}: {len(unlabelled)} of {len(images)} images have no label, such as {unlabelled[0]}; put a .cls or "
            ".json beside each, or give the folder alone if each of its tars is a class"
        )
    return [Member(key, member.offset_data, member.size, labels[key]) for key, member in images.items()]


def members(shard: Path, texts: tuple[str, ...] = LABEL_SUFFIXES) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Files in a tar, with the text of those whose name ends in one of `texts`.

    Raises:
        InputError: the tar is damaged.
    """
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isfile() and not Path(member.name).name.startswith("."):
                    text = archive.extractfile(member) if member.name.lower().endswith(texts) else None
                    yield member, text.read().decode(errors="replace").strip() if text else ""
            with shard.open("rb") as file:  # tarfile takes a broken header for the end
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError(f"no end mark at byte {archive.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{shard}: not a whole, uncompressed tar ({error}); fetch or make it again") from None


def split_key(name: str) -> tuple[str, str]:
    """What names a sample in a shard, up to the first dot after the folders, and the suffix in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, f".{suffix.lower()}"


def read_label(suffix: str, text: str) -> str:
    """The label in a key.cls or key.json; empty where there is none."""
    if suffix != ".json":
        return text if suffix == ".cls" else ""
    try:
        values = json.loads(text)
    except ValueError:
        return ""
    found = [str(values[name]) for name in LABEL_NAMES if isinstance(values, dict) and name in values]
    return found[0] if found else ""
