"""SUN397, 397 scenes, the first of its ten partitions, whose lists come as an archive of their own."""

from pathlib import Path

from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import Layout, known_class, lines, listed

LISTS = {"train": "Training_01", "val": "Testing_01"}


def read_sun(root: Path, split: str) -> Examples:
    """A split, from the folder that holds Training_01.txt; the images are beside it, one level up or in SUN397.

    Raises:
        InputError: a list, an image, or all images are missing.
    """
    path = root / f"{LISTS[split]}.txt"
    classes = [name.strip("/") for name in lines(root / "ClassName.txt")]
    positions = {name: index for index, name in enumerate(classes)}
    names = [name.strip("/") for name in lines(path)]
    files = [(name, known_class(name.rpartition("/")[0], positions, path)) for name in names]
    return listed("sun397", LISTS[split], image_root(root, names[0]), files, classes)


def image_root(root: Path, name: str) -> Path:
    """Folder of the images: that which holds the class of this one."""
    places = (root / "SUN397", root, root.parent / "SUN397", root.parent)
    for place in places:
        if (place / name).parent.is_dir():
            return place
    tried = ", ".join(str(place) for place in places)
    raise InputError(f"{root}: no images such as {name} in {tried}; unpack SUN397 beside its partitions")


LAYOUT = Layout(("Training_01.txt",), read_sun, {"Training_01": 19850, "Testing_01": 19850})
