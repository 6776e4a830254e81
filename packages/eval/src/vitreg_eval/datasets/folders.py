"""Data sets whose splits are folders with one sub-folder of images per class."""

from collections.abc import Sequence
from pathlib import Path

import torch
from vitreg_core.data.images import labelled_images
from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import image_files

TRAIN = ("train", "training")
VAL = ("val", "valid", "validation", "eval", "evaluation")
TEST = ("test", "testing")


def split_names(split: str, *, test_first: bool = False) -> tuple[str, ...]:
    """Folder names that a split may have, the most fitting first.

    Where there are folders for both validation and test, `val` means validation unless `test_first`.
    """
    if split == "train":
        return TRAIN
    return (*TEST, *VAL) if test_first else (*VAL, *TEST)


def split_folder(root: Path, names: Sequence[str]) -> Path | None:
    """The first of the folders that there is."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def open_folders(name: str, root: Path, split: str, *, test_first: bool = False) -> Examples:
    """Examples of `<train|val>/<class>/<image>` below a folder.

    Raises:
        InputError: the folder, its split or its class folders are missing, or a class has no image.
    """
    names = split_names(split, test_first=test_first)
    folder = split_folder(root, names)
    if folder is None:
        problem = "no such folder" if not root.is_dir() else f"no folder {', '.join(names)}"
        raise InputError(f"{root}: {problem}; give a folder with train/<class>/ and val/<class>/ images")
    found = labelled_images(folder)
    files = [path.relative_to(root).as_posix() for path in found.paths]
    record_split = next(names[0] for names in (TRAIN, VAL, TEST) if folder.name in names)
    return image_files(name, record_split, root, files, torch.tensor(found.labels), found.classes)
