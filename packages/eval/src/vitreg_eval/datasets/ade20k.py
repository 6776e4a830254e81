"""ADE20K as in the Scene Parsing challenge of 2016: 150 classes, from a user's folder."""

from pathlib import Path

from vitreg_core.data.images import list_images
from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import IGNORE
from vitreg_eval.datasets.masks import MaskSet, mask_pairs

NAME = "ADEChallengeData2016"
FOLDERS = {"train": "training", "val": "validation"}
CLASSES = 150
TABLE = {0: IGNORE, IGNORE: IGNORE} | {number: number - 1 for number in range(1, CLASSES + 1)}
"""0 is other or unlabelled, which does not count; a value of 255, where one occurs, does not either."""
NAMES_FILE = "objectInfo150.txt"


def ade20k(root: Path, split: str) -> MaskSet:
    """A split of ADE20K: 20,210 images to train on, 2,000 to measure on.

    Args:
        root: the folder ADEChallengeData2016, or one up to two levels above it. Lists ADE20K_object150_train.txt and
            _val.txt in it, where they are there, say which images belong to a split.
        split: `train` or `val`.

    Raises:
        InputError: a folder, image or mask is missing, or it is the full ADE20K, which is another data set.
    """
    folder = find_root(root, split)
    listed = folder / f"ADE20K_object150_{split}.txt"
    images = read_list(listed, folder) if listed.is_file() else list_images(folder / "images" / FOLDERS[split])
    annotations = folder / "annotations"
    files = [(image, annotations / image.relative_to(folder / "images").with_suffix(".png")) for image in images]
    return MaskSet(mask_pairs(files, TABLE, folder, "ade20k", split), class_names(folder))


def find_root(root: Path, split: str) -> Path:
    """The folder with the images and masks of a split.

    Raises:
        InputError: there is none, or it is the full release.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder that holds {NAME}")
    for folder in (root, root / NAME, *sorted(root.glob(f"*/{NAME}"))):
        if all((folder / kind / FOLDERS[split]).is_dir() for kind in ("images", "annotations")):
            return folder
    if is_full_release(root):
        raise InputError(
            f"{root}: this is the full ADE20K, whose masks code over 3,000 classes by colour; the benchmark is its "
            f"150-class version: give the folder {NAME} of the Scene Parsing challenge"
        )
    raise InputError(
        f"{root}: no images/{FOLDERS[split]} and annotations/{FOLDERS[split]} in it or in {NAME}; "
        f"unpack {NAME}.zip there"
    )


def is_full_release(root: Path) -> bool:
    """Whether a folder holds ADE20K_2021_17_01 or an older full release: its index, or masks beside the images."""
    places = [root, *sorted(root.glob("ADE20K_*"))]
    return (
        any(
            any(place.glob("index_ade20k.*")) or next(place.glob("images/**/*_seg.png"), None) is not None
            for place in places
        )
        or (root / "images" / "ADE").is_dir()
    )


def read_list(path: Path, folder: Path) -> list[Path]:
    """Images that a list names, as `training/ADE_train_00000001.jpg`.

    Raises:
        InputError: it cannot be read, or names a file outside of the folder of images.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable list ({error}); remove it to take all images") from None
    for line in lines:
        if ".." in Path(line).parts or Path(line).is_absolute():
            raise InputError(f"{path}: {line!r} is not below images; lines are such as training/ADE_train_00000001.jpg")
    return [folder / "images" / line for line in lines]


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the classes, from the table that comes with the images; numbers without it.

    Raises:
        InputError: the table does not have 150 rows.
    """
    path = folder / NAMES_FILE
    if not path.is_file():
        return tuple(f"class {number}" for number in range(1, CLASSES + 1))
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    names = tuple(row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdecimal())
    if len(names) != CLASSES:
        raise InputError(f"{path}: {len(names)} classes, not {CLASSES}; fetch it again or remove it")
    return names
