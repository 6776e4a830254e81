"""Describable Textures, 47 of them, the first of its ten divisions: train1 and val1 to train on, test1 to report on."""

from pathlib import Path

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import Layout, class_positions, lines, listed

SPLITS = {"train": ("train1", "val1"), "val": ("test1",)}


def read_dtd(root: Path, split: str) -> Examples:
    """A split, from the folder that holds labels and images.

    Raises:
        InputError: a list or an image is missing or damaged.
    """
    names = {part: lines(root / "labels" / f"{part}.txt") for parts in SPLITS.values() for part in parts}
    classes = class_positions(name.partition("/")[0] for part in names.values() for name in part)
    files = [(f"images/{name}", classes[name.partition("/")[0]]) for part in SPLITS[split] for name in names[part]]
    return listed("dtd", "+".join(SPLITS[split]), root, files, list(classes))


LAYOUT = Layout(("labels/train1.txt",), read_dtd, {"train1+val1": 3760, "test1": 1880})
