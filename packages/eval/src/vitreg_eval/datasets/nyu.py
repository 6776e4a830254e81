"""NYU Depth v2: the lists and files of BTS, which most depth papers use, or the labelled .mat file.

The training list has 24,231 pairs of the raw video, the test list the 654 frames of the official split. The .mat file
holds the 795 and 654 labelled frames of that split: the same test frames, another and smaller training set.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_core.extras import require

from vitreg_eval.datasets import sha256
from vitreg_eval.datasets.depth_files import (
    Decode,
    Files,
    Split,
    below,
    by_scale,
    first_place,
    listed_pairs,
    pairs_of_files,
    read_lines,
)
from vitreg_eval.datasets.examples import Pairs
from vitreg_eval.results import DataRecord

LISTS = ("nyu_{}.txt", "nyudepthv2_{}_files_with_gt.txt", "{}.txt")
LEVELS = ("", "nyu_depth_v2", "nyu", "NYU")
FOLDERS = {"train": ("", "sync", "train"), "test": ("", "official_splits/test", "test")}
LABELLED, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
UNITS_PER_METRE = 1000.0
FRAME = (slice(7, 474), slice(7, 632))
"""Rows and columns that hold a picture; the rest is the white border of the rectified frames."""


def nyu_pairs(root: Path, split: Split, scale: float = UNITS_PER_METRE) -> Pairs:
    """Pictures of 640x480 with depth from the Kinect.

    Args:
        root: folder with the lists, one above it, or one that holds nyu_depth_v2_labeled.mat and splits.mat.
        split: `train` or `test`.
        scale: units of the depth files per metre.

    Raises:
        InputError: neither layout is there, or the first files of the list are not.
    """
    folders = [root / level for level in LEVELS]
    labelled = next((folder for folder in folders if (folder / LABELLED).is_file()), None)
    lists = [folder / name.format(split) for folder in folders for name in LISTS]
    if labelled is not None and not any(path.is_file() for path in lists):
        return labelled_pairs(labelled, split)
    listing = first_place(lists, f"list of the NYU Depth v2 {split} split")
    return files_of_list(listing, split, by_scale(scale))


def files_of_list(listing: Path, split: Split, decode: Decode) -> Pairs:
    """The pairs of a list, whose names begin at one of the usual folders beside it."""
    first = next((line.split()[0] for line in read_lines(listing) if line.strip()), "")
    places = [listing.parent / name for name in FOLDERS[split]]
    where = first_place([below(place, first) for place in places], f"{listing}: the first picture") if first else None
    root = next((place for place in places if below(place, first) == where), places[0])
    return pairs_of_files(
        listed_pairs(root, listing, lambda image, depth: Files(below(root, image), below(root, depth))),
        root,
        name="nyu",
        split=split,
        decode=decode,
    )


def labelled_pairs(folder: Path, split: Split) -> Pairs:
    """The labelled frames: raw depth cut to millimetres and pictures in a black frame, as BTS writes its test set."""
    h5py = require("h5py", "nyu", f"reading {LABELLED}", package="vitreg-eval")
    frames = read_splits(folder / SPLITS, split)

    @lru_cache(maxsize=1)
    def file() -> Any:  # noqa: ANN401 (of a package that may be missing)
        return h5py.File(folder / LABELLED, "r")

    def read(index: int) -> tuple[Image.Image, Tensor]:
        try:
            pixels, depth = (np.asarray(file()[name][frames[index]]).T for name in ("images", "rawDepths"))
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise InputError(
                f"{folder / LABELLED}: frame {frames[index]} not readable ({error}); fetch it again"
            ) from None
        framed = np.zeros_like(pixels)
        framed[FRAME] = pixels[FRAME]
        return Image.fromarray(framed), torch.from_numpy(np.floor(depth.astype(np.float64) * 1000) / 1000).float()

    names = [f"frame {frame}" for frame in frames]
    record = DataRecord(name="nyu-labelled", split=split, n=len(names), hash=sha256("\n".join(names)))
    return Pairs(record, read, names)


def read_splits(path: Path, split: Split) -> list[int]:
    """Frames of a split, from 0; the file counts from 1.

    Raises:
        InputError: the file is missing, damaged, or names no frames.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise InputError(f"{path}: no such file; put the official splits.mat beside {LABELLED}")
    try:
        numbers = np.asarray(loadmat(path)[f"{split}Ndxs"]).ravel().astype(int)
    except Exception as error:  # SciPy's reader raises whatever damage makes it stumble over
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not the official splits ({reason}); fetch it again") from None
    if not len(numbers) or numbers.min() < 1:
        raise InputError(f"{path}: no frames of the {split} split, or one below 1; fetch it again")
    return (numbers - 1).tolist()
