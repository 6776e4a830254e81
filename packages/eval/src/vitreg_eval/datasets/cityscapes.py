"""Cityscapes with fine masks: street scenes, 19 classes, from a user's folder."""

from pathlib import Path

from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import IGNORE
from vitreg_eval.datasets.masks import MaskSet, mask_pairs

CLASSES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
"""The classes that are trained and measured, in order, with their numbers in the files `labelIds`."""
LABEL_IDS = (
    dict.fromkeys(range(34), IGNORE)
    | {IGNORE: IGNORE}  # a licence plate, number -1
    | {number: index for index, number in enumerate(CLASSES.values())}
)
TRAIN_IDS = {number: number for number in range(len(CLASSES))} | {IGNORE: IGNORE}
TABLES = {"labelTrainIds": TRAIN_IDS, "labelIds": LABEL_IDS}
IMAGE = "_leftImg8bit.png"


def cityscapes(root: Path, split: str) -> MaskSet:
    """A split of Cityscapes: 2,975 images to train on, 500 to measure on.

    Args:
        root: holds leftImg8bit/<split>/<city>/ and gtFine/<split>/<city>/, or is up to one level above them. Masks
            are those of the original files (labelIds) or of prepared ones (labelTrainIds).
        split: `train` or `val`.

    Raises:
        InputError: a folder, image or mask is missing.
    """
    folder = find_root(root, split)
    images = sorted((folder / "leftImg8bit" / split).glob(f"*/*{IMAGE}"))
    coding = next(
        (name for name in TABLES if any((folder / "gtFine" / split).glob(f"*/*_gtFine_{name}.png"))), "labelIds"
    )
    files = [(image, mask_of(image, folder / "gtFine" / split, coding)) for image in images]
    return MaskSet(mask_pairs(files, TABLES[coding], folder, "cityscapes", split), tuple(CLASSES))


def find_root(root: Path, split: str) -> Path:
    """The folder with the images and fine masks of a split.

    Raises:
        InputError: there is none.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder that holds leftImg8bit and gtFine")
    for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        if all((folder / kind / split).is_dir() for kind in ("leftImg8bit", "gtFine")):
            return folder
    raise InputError(
        f"{root}: no leftImg8bit/{split} and gtFine/{split} in it; unpack leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip there"
    )


def mask_of(image: Path, masks: Path, coding: str) -> Path:
    """Where the mask of an image is."""
    return masks / image.parent.name / image.name.replace(IMAGE, f"_gtFine_{coding}.png")
