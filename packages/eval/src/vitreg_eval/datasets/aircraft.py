"""FGVC-Aircraft, its 100 variants: trainval to train on, test to report on."""

from pathlib import Path

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import Layout, columns, known_class, lines, listed


def read_aircraft(root: Path, split: str) -> Examples:
    """A split, from the folder that holds `data`; the strip with the copyright stays in the images.

    Raises:
        InputError: a list or an image is missing or damaged.
    """
    part = {"train": "trainval", "val": "test"}[split]
    classes = lines(root / "data" / "variants.txt")  # their order numbers them
    positions = {name: index for index, name in enumerate(classes)}
    path = root / "data" / f"images_variant_{part}.txt"
    files = [(f"data/images/{image}.jpg", known_class(name, positions, path)) for image, name in columns(path, 2)]
    return listed("aircraft", part, root, files, classes)


LAYOUT = Layout(("data/images_variant_trainval.txt",), read_aircraft, {"trainval": 6667, "test": 3333})
