"""Labelled data sets by name: from their official layout, as class folders, or from the hub."""

from pathlib import Path
from typing import NamedTuple

from vitreg_core.config import nearest
from vitreg_core.errors import InputError

from vitreg_eval.config.datasets import DATASETS, HUB
from vitreg_eval.datasets import aircraft, caltech, cars, cifar, cub, dtd, flowers, food, imagenet, pets, places, sun
from vitreg_eval.datasets import voc_classes as voc
from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.folders import TRAIN, open_folders, split_folder, split_names
from vitreg_eval.datasets.hub import open_hub
from vitreg_eval.datasets.layouts import Layout, find_root
from vitreg_eval.datasets.leakage import check_classes, check_disjoint
from vitreg_eval.paths import data_folder
from vitreg_eval.results import DataRecord

LAYOUTS: dict[str, Layout] = {
    "imagenet-1k": imagenet.IMAGENET,
    "imagenette": imagenet.IMAGENETTE,
    "places205": places.LAYOUT,
    "aircraft": aircraft.LAYOUT,
    "cifar10": cifar.CIFAR10,
    "cifar100": cifar.CIFAR100,
    "cub": cub.LAYOUT,
    "caltech101": caltech.LAYOUT,
    "cars": cars.LAYOUT,
    "dtd": dtd.LAYOUT,
    "flowers102": flowers.LAYOUT,
    "food101": food.LAYOUT,
    "pets": pets.LAYOUT,
    "sun397": sun.LAYOUT,
    "voc2007": voc.LAYOUT,
}
OWN_SPLIT = " (class folders)"
"""Follows the name of a data set whose split is the user's, not the official one."""


class Splits(NamedTuple):
    """A labelled data set."""

    train: Examples
    val: Examples
    """What numbers are reported on."""
    notes: list[str]
    """What the reader must know of the images."""


def open_splits(dataset: str | None, folder: Path | None) -> Splits:
    """Both splits of a labelled data set, which have the same classes and share no image.

    Arguments as for `open_labelled`.

    Raises:
        InputError: a split is missing or damaged, both share an image, or their classes differ.
    """
    train, val = open_labelled(dataset, folder, "train"), open_labelled(dataset, folder, "val")
    check_classes(train, val)
    counts = [note for examples in (train, val) if (note := count_note(examples.data))]
    return Splits(train, val, [*counts, *check_disjoint(train, val)])


def open_labelled(dataset: str | None, folder: Path | None, split: str) -> Examples:
    """A split of a labelled data set.

    Args:
        dataset: a name of `config.datasets.DATASETS`, `hub:ORG/NAME[:CONFIG][@TRAIN,VAL]`, or None for a folder with
            train/<class>/ and val/<class>/ images; `training`, `valid`, `validation`, `eval` and `test` will do too.
        folder: the folder of the data set, or one at most two levels above it; that of $VITREG_DATA if None. Not read
            for a hub data set.
        split: `train`, or `val`: the official split that numbers are reported on, whatever its name.

    Raises:
        InputError: no such data set, or a part of it is missing or damaged.
    """
    if dataset is not None and dataset.startswith(HUB):
        return open_hub(dataset, split)
    if dataset is not None and dataset not in DATASETS:
        raise InputError(
            f"--dataset {dataset}: give {', '.join(DATASETS)} or {HUB}ORG/NAME{nearest(dataset, DATASETS)}"
        )
    folder = data_folder(folder)
    return open_folders(folder.resolve().name, folder, split) if dataset is None else open_named(dataset, folder, split)


def open_named(dataset: str, folder: Path, split: str) -> Examples:
    """A split of a named data set: from the official layout if it is there, else as class folders.

    Raises:
        InputError: neither is there; names the places looked at.
    """
    layout = LAYOUTS[dataset]
    root = find_root(folder, layout)
    if root is not None:
        return layout.read(root, split)
    test_first = "val" not in layout.counts
    needed = (TRAIN, split_names("val", test_first=test_first))
    for place in (folder / dataset, folder):
        if all(split_folder(place, names) for names in needed):
            return open_folders(f"{dataset}{OWN_SPLIT}", place, split, test_first=test_first)
    raise InputError(
        f"{folder}: no {dataset} there or up to two levels below (looked for {', '.join(layout.marks)}; as class "
        f"folders for train/ and {needed[1][0]}/ there and in {dataset}/); its layout: {DATASETS[dataset]}"
    )


def count_note(record: DataRecord) -> str | None:
    """A line for the reader where an official split has another number of images than published."""
    layout = LAYOUTS.get(record.name)
    expected = layout.counts.get(record.split) if layout else None
    if expected is None or expected == record.n:
        return None
    return f"warning: {record.name} {record.split} has {record.n:,} images here, officially {expected:,}"
