"""Caltech-101: 101 classes without the background, split by us, since there is no official split."""

import hashlib
from pathlib import Path

from vitreg_core.data.images import class_folders, list_images
from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import Layout, listed

FOLDER = "101_ObjectCategories"
BACKGROUND = "BACKGROUND_Google"
PER_CLASS = 30
"""Training images of each class: the usual protocol."""


def read_caltech(root: Path, split: str) -> Examples:
    """A split, from the folder that holds 101_ObjectCategories.

    Of each class the 30 images whose names have the lowest SHA-256 are trained on, the others reported on: as good as
    drawn, and the same on every machine.

    Raises:
        InputError: a class has not more than 30 images.
    """
    classes = [name for name in class_folders(root / FOLDER) if name != BACKGROUND]
    files = [(name, label) for label, of in enumerate(classes) for name in class_split(root, of, split)]
    return listed("caltech101", f"{split} (30 per class)", root, files, classes)


def class_split(root: Path, name: str, split: str) -> list[str]:
    """Images of a class that belong to a split, in the order of their names."""
    names = [path.relative_to(root).as_posix() for path in list_images(root / FOLDER / name)]
    if len(names) <= PER_CLASS:
        raise InputError(f"{root / FOLDER / name}: {len(names)} images; a class needs more than {PER_CLASS}")
    order = sorted(names, key=lambda file: hashlib.sha256(file.encode()).digest())
    return sorted(order[:PER_CLASS] if split == "train" else order[PER_CLASS:])


LAYOUT = Layout((f"{FOLDER}/",), read_caltech, {"train (30 per class)": 3030, "val (30 per class)": 5647})
