"""ImageNet-1k and its part Imagenette: one folder for each wnid, whose sorted order numbers the classes."""

import re
from collections.abc import Callable
from pathlib import Path

from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.folders import TRAIN, VAL, open_folders, split_folder
from vitreg_eval.datasets.layouts import Layout, known_class, lines, listed, subfolders

WNID = re.compile(r"n\d{8}")
TEN = frozenset(
    f"n{number:08d}"
    for number in (1440764, 2102040, 2979186, 3000684, 3028079, 3394916, 3417042, 3425413, 3445777, 3888257)
)
"""Wnids of Imagenette."""
SOLUTION = "LOC_val_solution.csv"


def imagenet_reader(name: str) -> Callable[[Path, str], Examples]:
    """What reads a split of one of the two data sets."""

    def read(root: Path, split: str) -> Examples:
        """A split, from the folder that holds train and val.

        Raises:
            InputError: a class folder is no wnid, or val is one flat folder without a list of its classes.
        """
        folder = split_folder(root, VAL)
        if split == "val" and folder is not None and not subfolders(folder):
            return read_flat(name, root, folder)
        examples = open_folders(name, root, split)
        for wnid in examples.classes:
            if not WNID.fullmatch(wnid):
                raise InputError(f"{root}: class folder {wnid!r} is no wnid such as n01440764; rename or remove it")
        return examples

    return read


def read_flat(name: str, root: Path, folder: Path) -> Examples:
    """Evaluation images in one folder, with their classes from Kaggle's LOC_val_solution.csv.

    Raises:
        InputError: there is no such list beside the folder or up to three levels above.
    """
    places = [place / SOLUTION for place in (root, *root.absolute().parents[:3])]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise InputError(
            f"{folder}: images without class folders, and no {SOLUTION} in or above {root}; "
            f"sort the images into {folder.name}/<wnid>/, as in train"
        )
    classes = [place.name for place in subfolders(split_folder(root, TRAIN) or root)]
    positions = {wnid: index for index, wnid in enumerate(classes)}
    rows = [line.partition(",") for line in lines(path)[1:]]
    files = [
        (f"{folder.name}/{image}.JPEG", known_class(boxes.partition(" ")[0], positions, path))
        for image, _, boxes in rows
    ]
    return listed(name, folder.name, root, sorted(files), classes)


def train_wnids(root: Path) -> set[str]:
    """Names of the class folders of train."""
    folder = split_folder(root, TRAIN)
    return {place.name for place in subfolders(folder)} if folder else set()


MARKS = tuple(f"{name}/" for name in TRAIN)
IMAGENET = Layout(
    MARKS,
    imagenet_reader("imagenet-1k"),
    {"train": 1281167, "val": 50000},
    lambda root: any(WNID.fullmatch(name) and name not in TEN for name in train_wnids(root)),
)
IMAGENETTE = Layout(
    MARKS,
    imagenet_reader("imagenette"),
    {"train": 9469, "val": 3925},
    lambda root: bool(names := train_wnids(root)) and names <= TEN,
)
