"""SUN RGB-D: indoor scenes from four cameras. Only its test split is read, to measure heads trained on NYU Depth v2."""

from functools import partial
from pathlib import Path

import numpy as np
from vitreg_core.errors import InputError

from vitreg_eval.datasets.depth_files import Files, below, first_place, listed_pairs, pairs_of_files
from vitreg_eval.datasets.examples import Pairs

LIST = "SUNRGBD_val_splits.txt"
SPLITS = ("SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat", "traintestSUNRGBD/allsplit.mat", "allsplit.mat")
TREE = "SUNRGBD/"
DEPTHS = ("depth_bfx", "depth")
UNITS_PER_METRE = 1000.0
FARTHEST = 8.0
"""Metres to which the evaluation cuts depth (Bhat et al. 2021)."""


def sun_rgbd_pairs(root: Path, scale: float = UNITS_PER_METRE) -> Pairs:
    """The official test split, 5,050 pictures; depth beyond 8 m counts as 8 m.

    Args:
        root: folder that holds SUNRGBD and, as a list `image depth`, SUNRGBD_val_splits.txt or, as the toolbox has it,
            SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat.
        scale: units per metre of the numbers, once their bits are back in place.

    Raises:
        InputError: no list there, or it lists files that are missing.
    """
    listing = first_place([root / name for name in (LIST, *SPLITS)], "list of the SUN RGB-D test split")
    files = listed_pairs(root, listing) if listing.suffix == ".txt" else toolbox_files(root, listing)
    return pairs_of_files(files, root, name="sun-rgbd", split="test", decode=partial(decode, scale))


def decode(scale: float, raw: np.ndarray) -> np.ndarray:
    """Metres of the stored numbers, whose three lowest bits hold the three highest of the depth."""
    units = (raw >> 3) | (raw << 13)
    return np.minimum(units.astype(np.float32) / np.float32(scale), np.float32(FARTHEST))


def toolbox_files(root: Path, listing: Path) -> list[Files]:
    """Files of the folders that the toolbox lists, by their place in its authors' file system."""
    return [files_in(below(root, folder.rstrip("/"))) for folder in read_folders(listing)]


def read_folders(path: Path) -> list[str]:
    """Folders of the test split, from `SUNRGBD/` on.

    Raises:
        InputError: the file is damaged or lists nothing.
    """
    from scipy.io import loadmat

    try:
        folders = [str(np.asarray(entry).item()) for entry in loadmat(path)["alltest"].ravel()]
    except Exception as error:  # SciPy's reader raises whatever damage makes it stumble over
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not the official split ({reason}); fetch it again") from None
    if not folders or not all(TREE in folder for folder in folders):
        raise InputError(f"{path}: {len(folders)} test folders, some without {TREE}; fetch the official split again")
    return [TREE + folder.partition(TREE)[2] for folder in folders]


def files_in(folder: Path) -> Files:
    """The one picture of a folder and its depth: the refined one, else as the camera gave it."""
    image = only_file(folder / "image")
    depth = next((folder / name for name in DEPTHS if (folder / name).is_dir()), folder / DEPTHS[0])
    return Files(image, only_file(depth))


def only_file(folder: Path) -> Path:
    """The file of a folder that holds one."""
    found = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if len(found) != 1:
        raise InputError(f"{folder}: {len(found)} files, one expected, which the split lists; complete the data")
    return found[0]
