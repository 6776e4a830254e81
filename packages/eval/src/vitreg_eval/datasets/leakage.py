"""What makes a number worthless: images that are both trained on and reported on, and classes that differ."""

import hashlib
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vitreg_core.errors import InputError

from vitreg_eval.config.datasets import DATASETS
from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import file_status

MOST = 50_000
"""Files of a size that occurs in both splits, up to which contents are compared."""
HEAD = 4096
"""Bytes of a file that are compared first."""


@dataclass(frozen=True, slots=True)
class File:
    """An image on the disk."""

    folder: Path
    name: str
    """Path below the folder."""
    place: tuple[int, int]
    """Device and number of the file: the same for all links to it."""
    size: int

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder / self.name


def check_classes(train: Examples, val: Examples) -> None:
    """Refuse splits whose classes differ, since their labels would not mean the same, and a single class.

    Raises:
        InputError: names classes that only one of them has, or the only one.
    """
    if train.classes != val.classes:
        alone = sorted(set(train.classes) ^ set(val.classes))[:5]
        raise InputError(f"{train.data.name}: classes only in train or only in val: {alone}; make them equal")
    if len(train.classes) < 2:
        raise InputError(f"{train.data.name}: one class, {train.classes[0]!r}, which any model names; give two or more")


def check_disjoint(train: Examples, val: Examples) -> list[str]:
    """Refuse splits that share an image: the same file, also by a link, or, in two files, the same bytes.

    Contents are compared among files of a size that occurs in both splits, unless these are more than 50,000. The
    official splits of some data sets hold a few copies, which all published numbers include: a note tells of them.

    Returns:
        Sentences for the reader.

    Raises:
        InputError: names a pair.
    """
    if train.folder is None or val.folder is None:
        refuse([(name, name) for name in sorted(set(train.names) & set(val.names))])
        return []
    files, others = list_files(train, train.folder), list_files(val, val.folder)
    refuse(pairs(files, others, lambda file: file.place))
    files, others = alike(files, others, lambda file: file.size)
    if len(files) + len(others) > MOST:
        return [f"{train.data.name}: too many files of equal size to compare what train and val hold; only paths were"]
    files, others = alike(files, others, lambda file: (file.size, content_hash(file, HEAD)))
    copies = pairs(files, others, lambda file: content_hash(file, None))
    if train.data.name not in DATASETS:
        refuse(copies)
    official = f"{len(copies)} of the {len(val)} official val images are in train, too"
    return [f"{official}: {other} as {one}" for one, other in copies[:1]]


def refuse(shared: list[tuple[str, str]]) -> None:
    """Refuse pairs of the same image."""
    if shared:
        one, other = shared[0]
        more = f" and {len(shared) - 1} more pairs" if len(shared) > 1 else ""
        raise InputError(f"{other}: in val, and as {one} in train{more}; take it out of one of them")


def list_files(examples: Examples, folder: Path) -> list[File]:
    """The files of a split.

    Raises:
        InputError: one of them is not there.
    """
    found = ((name, file_status(folder, name)) for name in examples.names)
    return [File(folder, name, (status.st_dev, status.st_ino), status.st_size) for name, status in found]


def alike(
    files: Iterable[File], others: Iterable[File], key: Callable[[File], Hashable]
) -> tuple[list[File], list[File]]:
    """What is left of two lists without files whose key the other has not."""
    left, right = [(key(file), file) for file in files], [(key(file), file) for file in others]
    shared = {value for value, _ in left} & {value for value, _ in right}
    return [file for value, file in left if value in shared], [file for value, file in right if value in shared]


def pairs(files: Iterable[File], others: Iterable[File], key: Callable[[File], Hashable]) -> list[tuple[str, str]]:
    """For each of the others whose key a file has: that file and it."""
    first = {key(file): file for file in files}
    return [(str(first[value].path), str(file.path)) for file in others if (value := key(file)) in first]


def content_hash(file: File, most: int | None) -> bytes:
    """SHA-256 of the first bytes of a file, or of all.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with file.path.open("rb") as content:
            return hashlib.sha256(content.read(most)).digest()
    except OSError as error:
        raise InputError(f"{file.path}: cannot be read ({error.strerror}); replace or remove it") from None
