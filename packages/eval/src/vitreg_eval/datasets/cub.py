"""CUB-200-2011, 200 birds: three lists that name each image by its number."""

from pathlib import Path

from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import Layout, class_index, columns, listed


def read_cub(root: Path, split: str) -> Examples:
    """A split, from the folder with images.txt.

    Raises:
        InputError: a list or an image is missing or damaged, or the lists do not name the same images.
    """
    classes = [name for _, name in columns(root / "classes.txt", 2)]
    names, labels, used = (
        table(root / name) for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    if not names.keys() == labels.keys() == used.keys():
        raise InputError(f"{root}: images.txt and its other lists name different images; unpack the data set again")
    wanted = {"train": "1", "val": "0"}[split]
    path = root / "image_class_labels.txt"
    files = [
        (f"images/{name}", class_index(labels[number], len(classes), path, first=1))
        for number, name in names.items()
        if used[number] == wanted
    ]
    return listed("cub", {"train": "train", "val": "test"}[split], root, files, classes)


def table(path: Path) -> dict[str, str]:
    """What a list says of each image, by the image's number."""
    return dict(columns(path, 2))


LAYOUT = Layout(("train_test_split.txt",), read_cub, {"train": 5994, "test": 5794})
