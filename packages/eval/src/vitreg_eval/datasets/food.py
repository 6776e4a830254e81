"""Food-101: the lists in meta name images without their suffix, below their class."""

from pathlib import Path

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import Layout, class_positions, lines, listed


def read_food(root: Path, split: str) -> Examples:
    """A split, from the folder that holds meta and images.

    Raises:
        InputError: a list or an image is missing or damaged.
    """
    names = {part: lines(root / "meta" / f"{part}.txt") for part in ("train", "test")}
    classes = class_positions(name.partition("/")[0] for part in names.values() for name in part)
    part = {"train": "train", "val": "test"}[split]
    files = [(f"images/{name}.jpg", classes[name.partition("/")[0]]) for name in names[part]]
    return listed("food101", part, root, files, list(classes))


LAYOUT = Layout(("meta/train.txt",), read_food, {"train": 75750, "test": 25250})
