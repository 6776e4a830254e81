"""Oxford-IIIT Pet, 37 breeds: trainval to train on, test to report on; classes count from 1."""

from pathlib import Path

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import Layout, class_index, columns, listed

BREEDS = 37


def read_pets(root: Path, split: str) -> Examples:
    """A split, from the folder that holds annotations and images.

    Raises:
        InputError: a list or an image is missing or damaged.
    """
    rows = {part: read_list(root / "annotations" / f"{part}.txt") for part in ("trainval", "test")}
    breeds = {label: name.rpartition("_")[0] for part in rows.values() for name, label in part}
    classes = [breeds.get(label, str(label + 1)) for label in range(BREEDS)]
    part = {"train": "trainval", "val": "test"}[split]
    return listed("pets", part, root, [(f"images/{name}.jpg", label) for name, label in rows[part]], classes)


def read_list(path: Path) -> list[tuple[str, int]]:
    """Name and class of each image; species and breed within it follow, and are not read."""
    return [(row[0], class_index(row[1], BREEDS, path, first=1)) for row in columns(path, 4)]


LAYOUT = Layout(("annotations/trainval.txt",), read_pets, {"trainval": 3680, "test": 3669})
