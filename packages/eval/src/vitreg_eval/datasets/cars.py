"""Stanford Cars, 196 models: annotations as MATLAB structures, classes from 1."""

from pathlib import Path

import numpy as np
from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import Layout, class_index, listed
from vitreg_eval.datasets.matlab import Value, read_variable

TRAIN, TEST = "cars_train_annos.mat", "cars_test_annos_withlabels.mat"


def read_cars(root: Path, split: str) -> Examples:
    """A split, from the folder that holds devkit, cars_train and cars_test.

    Raises:
        InputError: an annotation file or an image is missing or damaged.
    """
    part, file = {"train": ("train", TRAIN), "val": ("test", TEST)}[split]
    path = annotation_file(root, file)
    meta = annotation_file(root, "cars_meta.mat")
    classes = read_variable(meta, "class_names")
    if not isinstance(classes, list):
        raise InputError(f"{meta}: its class_names are no cells; unpack the data set again")
    rows = read_variable(path, "annotations")
    if not isinstance(rows, dict) or not {"fname", "class"} <= rows.keys():
        raise InputError(f"{path}: its annotations have no fname and class; take the file with the labels")
    files = [
        (f"cars_{part}/{name}", class_index(number(value), len(classes), path, first=1))
        for name, value in zip(rows["fname"], rows["class"], strict=True)
    ]
    return listed("cars", part, root, files, [str(name) for name in classes])


def number(value: Value) -> str:
    """A matrix of one number as text."""
    return f"{value[0]:g}" if isinstance(value, np.ndarray) and value.size == 1 else "?"


def annotation_file(root: Path, name: str) -> Path:
    """An annotation file, which is in devkit or, as the test labels are, beside it."""
    places = (root / "devkit" / name, root / name)
    for path in places:
        if path.is_file():
            return path
    raise InputError(f"{root}: no {name} there or in devkit; put it there (the test labels are a file of their own)")


LAYOUT = Layout((f"devkit/{TRAIN}", TRAIN), read_cars, {"train": 8144, "test": 8041})
