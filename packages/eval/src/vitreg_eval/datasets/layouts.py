"""What the layouts of the labelled data sets share: finding their folder, reading their lists."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from vitreg_core.data.images import read_image
from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.results import DataRecord

LEVELS = 2
"""Folders that may lie between the given one and that of the data set."""


@dataclass(frozen=True)
class Layout:
    """How the official files of a data set are found and read."""

    marks: tuple[str, ...]
    """Files of which one tells the folder of the data set; with a slash at the end, folders."""
    read: Callable[[Path, str], Examples]
    """From that folder and `train` or `val`, which is what numbers are reported on, to the examples."""
    counts: Mapping[str, int]
    """Images of the official splits, by the name that the record of the examples has."""
    fits: Callable[[Path], bool] = lambda _: True
    """Whether a marked folder is that of the data set, for marks that others have, too."""


def find_root(folder: Path, layout: Layout) -> Path | None:
    """The folder of a data set: the given one, or the nearest at most two levels below."""
    level = [folder]
    for _ in range(LEVELS + 1):
        for mark in layout.marks:
            for place in level:
                if is_there(place / mark, mark) and layout.fits(place):
                    return place
        level = [below for place in level for below in subfolders(place)]
    return None


def is_there(path: Path, mark: str) -> bool:
    """Whether a mark is there."""
    return path.is_dir() if mark.endswith("/") else path.is_file()


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, sorted, without hidden ones and those that may not be opened."""
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def listed(name: str, split: str, folder: Path, files: Sequence[tuple[str, int]], classes: Sequence[str]) -> Examples:
    """Examples of image files that a list names, each with its class.

    Args:
        name: of the data set.
        split: official name of the split.
        folder: what the names are below.
        files: relative name and class from 0 of every image.
        classes: names of the classes.

    Raises:
        InputError: no files, a name that leads out of the folder, or a listed file that is not there.
    """
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return image_files(name, split, folder, [file for file, _ in files], labels, classes)


def image_files(
    name: str,
    split: str,
    folder: Path,
    names: list[str],
    labels: Int[Tensor, " n"] | Int[Tensor, "n classes"],
    classes: Sequence[str],
) -> Examples:
    """Examples of image files, as `listed`; labels may be rows of several classes."""
    if not names:
        raise InputError(f"{folder}: the {split} split of {name} is empty; give one with images")

    def read(index: int) -> Image.Image:
        return read_image(folder / names[index])

    digest = hashlib.sha256(labels.to(torch.int64).numpy().tobytes())
    for file in names:
        digest.update(f"{file} {file_status(folder, file).st_size}\n".encode(errors="surrogateescape"))
    record = DataRecord(name=name, split=split, n=len(names), hash=digest.hexdigest())
    return Examples(record, tuple(classes), labels, read, names, folder)


def file_status(folder: Path, name: str) -> os.stat_result:
    """What the disk knows of a listed file: its size above all.

    Raises:
        InputError: it lies outside the folder or is not there.
    """
    if name.startswith("/") or ".." in name.split("/"):
        raise InputError(f"{name!r}: a list of {folder} leads out of it; take the official list")
    try:
        return (folder / name).stat()
    except (OSError, ValueError):
        raise InputError(f"{folder / name}: listed but not there; unpack the images again") from None


def lines(path: Path) -> list[str]:
    """Lines of a text file, without blanks around them and without empty ones.

    Raises:
        InputError: it is missing, empty or no text.
    """
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); unpack the data set again") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; unpack the data set again") from None
    if not any(found):
        raise InputError(f"{path}: the list is empty; unpack the data set again")
    return [line for line in found if line]


def columns(path: Path, count: int) -> list[list[str]]:
    """Words of each line of a list; the last one takes the rest of the line.

    Raises:
        InputError: as `lines`, or a line with fewer words.
    """
    rows = [line.split(maxsplit=count - 1) for line in lines(path)]
    for row in rows:
        if len(row) < count:
            raise InputError(f"{path}: {' '.join(row)[:80]!r} has not {count} columns; unpack the data set again")
    return rows


def class_index(word: object, classes: int, path: Path, *, first: int = 0) -> int:
    """Class from 0 of a number in a list whose classes count from `first`.

    Raises:
        InputError: it is no number or out of range.
    """
    try:
        number = int(str(word)) - first
    except ValueError:
        number = -1
    if not 0 <= number < classes:
        raise InputError(
            f"{path}: class {str(word)[:40]!r} is not in {first} to {classes - 1 + first}; unpack it again"
        )
    return number


def class_positions(names: Iterable[str]) -> dict[str, int]:
    """Position of each name in the sorted order of the different ones."""
    return {name: index for index, name in enumerate(sorted(set(names)))}


def known_class(name: str, positions: Mapping[str, int], path: Path) -> int:
    """Position of a class.

    Raises:
        InputError: there is none of that name.
    """
    if name not in positions:
        raise InputError(f"{path}: no class is called {name[:80]!r}; unpack the data set again")
    return positions[name]
