"""PASCAL VOC 2012 segmentation: 20 classes and the background, from a user's folder."""

from pathlib import Path

from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import IGNORE
from vitreg_eval.datasets.masks import MaskSet, mask_pairs

CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
TABLE = {number: number for number in range(len(CLASSES))} | {IGNORE: IGNORE}
"""255 marks the border of an object, which does not count."""
YEAR = "VOC2012"
AUGMENTED, AUGMENTED_LISTS = "SegmentationClassAug", ("trainaug", "train_aug")
"""Folder and list of the 10,582 masks that include those of the Semantic Boundaries data set."""


def voc_masks(root: Path, split: str) -> MaskSet:
    """A split of VOC 2012 segmentation: 1,464 images to train on, 1,449 to measure on.

    Training takes the 10,582 images of `trainaug` where their masks and list are there; the record then names it.

    Args:
        root: the folder that holds VOCdevkit, VOCdevkit itself, or VOC2012 in it.
        split: `train` or `val`.

    Raises:
        InputError: a folder, list, image or mask is missing.
    """
    folder = find_root(root)
    lists = folder / "ImageSets" / "Segmentation"
    masks = folder / "SegmentationClass"
    if split == "train" and (folder / AUGMENTED).is_dir():
        found = [name for name in AUGMENTED_LISTS if (lists / f"{name}.txt").is_file()]
        if not found:
            raise InputError(f"{lists}: {AUGMENTED} is there, its list trainaug.txt is not; add it or move {AUGMENTED}")
        split, masks = found[0], folder / AUGMENTED
    files = [(folder / "JPEGImages" / f"{name}.jpg", masks / f"{name}.png") for name in read_list(lists, split)]
    return MaskSet(mask_pairs(files, TABLE, folder, "voc12", split), CLASSES)


def find_root(root: Path) -> Path:
    """The folder of the year.

    Raises:
        InputError: it is not there, or has no masks.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder that holds VOCdevkit")
    levels = ("", f"{YEAR}", f"VOCdevkit/{YEAR}", f"*/{YEAR}", f"*/VOCdevkit/{YEAR}")
    places = [place for level in levels for place in ([root] if not level else sorted(root.glob(level)))]
    for folder in places:
        if (folder / "SegmentationClass").is_dir() and (folder / "ImageSets" / "Segmentation").is_dir():
            return folder
    there = next((place for place in places if (place / "JPEGImages").is_dir()), root)
    raise InputError(
        f"{there}: no SegmentationClass and ImageSets/Segmentation in it; unpack VOCtrainval_11-May-2012.tar again"
    )


def read_list(lists: Path, split: str) -> list[str]:
    """Names of the images of a split; a list may also give paths of image and mask."""
    path = lists / f"{split}.txt"
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable list ({error}); unpack VOC2012 again") from None
    return [Path(words[0]).stem for words in lines]
