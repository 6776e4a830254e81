"""Oxford Flowers, 102 of them: setid.mat and imagelabels.mat, in which images and classes count from 1."""

from pathlib import Path

import numpy as np
from jaxtyping import Int
from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import Layout, class_index, listed
from vitreg_eval.datasets.matlab import read_variable

CLASSES = 102
SPLITS = {"train": ("trnid", "valid"), "val": ("tstid",)}


def read_flowers(root: Path, split: str) -> Examples:
    """A split, from the folder with setid.mat: trnid and valid (2,040 images) to train on, tstid to report on.

    Raises:
        InputError: a list or an image is missing or damaged.
    """
    labels = whole_numbers(root / "imagelabels.mat", "labels")
    path = root / "setid.mat"
    numbers = np.concatenate([whole_numbers(path, key) for key in SPLITS[split]]).tolist()
    if not all(1 <= number <= len(labels) for number in numbers):
        raise InputError(f"{path}: names images beyond the {len(labels)} of imagelabels.mat; unpack both again")
    files = [
        (f"jpg/image_{number:05d}.jpg", class_index(labels[number - 1], CLASSES, root / "imagelabels.mat", first=1))
        for number in numbers
    ]
    return listed("flowers102", "+".join(SPLITS[split]), root, files, [str(1 + index) for index in range(CLASSES)])


def whole_numbers(path: Path, key: str) -> Int[np.ndarray, " n"]:
    """A row of whole numbers.

    Raises:
        InputError: it is something else.
    """
    values = read_variable(path, key)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu":
        raise InputError(f"{path}: {key} is no row of whole numbers; unpack the data set again")
    return values.astype(np.int64)


LAYOUT = Layout(("setid.mat",), read_flowers, {"trnid+valid": 2040, "tstid": 6149})
