"""Places205: train_places205.csv and val_places205.csv, each line a path and its class from 0."""

from pathlib import Path

from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import Layout, class_index, lines, listed

CLASSES = 205
IMAGES = ("images256", "data/vision/torralba/deeplearning/images256")
"""Where the official archive puts the images, below the folder it is unpacked in."""


def read_places(root: Path, split: str) -> Examples:
    """A split, from the folder with the lists; the images are beside it, below it or below its parent.

    Raises:
        InputError: a list, an image, or all images are missing.
    """
    rows = {part: read_list(root / f"{part}_places205.csv") for part in ("train", "val")}
    scenes = {label: name.rpartition("/")[0] for part in rows.values() for name, label in part}
    classes = [scenes.get(label, str(label)) for label in range(CLASSES)]
    return listed("places205", split, image_root(root, rows[split][0][0]), rows[split], classes)


def read_list(path: Path) -> list[tuple[str, int]]:
    """Path and class of each image, with a blank or a comma between them."""
    rows = [line.replace(",", " ").rsplit(maxsplit=1) for line in lines(path)]
    for row in rows:
        if len(row) != 2:
            raise InputError(f"{path}: {row[0][:80]!r} has not 2 columns; unpack the data set again")
    return [(name.strip("/"), class_index(label, CLASSES, path)) for name, label in rows]


def image_root(root: Path, name: str) -> Path:
    """Folder of the images: that which holds the class of this one."""
    places = [place / below for place in (root, root.parent) for below in ("", *IMAGES)]
    for place in places:
        if (place / name).parent.is_dir():
            return place
    tried = ", ".join(str(place) for place in places)
    raise InputError(f"{root}: no images such as {name} in {tried}; unpack them beside the lists")


LAYOUT = Layout(("train_places205.csv",), read_places, {"train": 2448873, "val": 20500})
