"""PASCAL VOC 2007 as classification of whole images, which may show several of its 20 classes."""

from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import Layout, image_files
from vitreg_eval.datasets.voc import VocImage, voc_images

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def read_voc(root: Path, split: str) -> Examples:
    """A split, from a folder that `voc_images` knows: trainval to train on, test to report on.

    Labels are `n 20`: 1 where an object of the class is there, -1 where all of them are marked as difficult, which
    the benchmark does not judge, 0 elsewhere.

    Raises:
        InputError: a list, an annotation or an image is missing or damaged.
    """
    part = {"train": "trainval", "val": "test"}[split]
    images = voc_images(root, 2007, part)
    folder = images[0].path.parents[1]
    names = [image.path.relative_to(folder).as_posix() for image in images]
    return image_files("voc2007", part, folder, names, torch.stack([presence(image) for image in images]), CLASSES)


def presence(image: VocImage) -> Int[Tensor, "20"]:
    """What an image shows, by class."""
    row = torch.zeros(len(CLASSES), dtype=torch.int64)
    for name, difficult in zip(image.classes, image.difficult.tolist(), strict=True):
        if name not in CLASSES:
            raise InputError(f"{image.path}: annotated with {name[:40]!r}, no class of VOC; unpack VOC2007 again")
        position = CLASSES.index(name)
        if not difficult:
            row[position] = 1
        elif row[position] == 0:
            row[position] = -1
    return row


LAYOUT = Layout(
    ("VOC2007/ImageSets/Main/", "VOCdevkit/VOC2007/ImageSets/Main/", "ImageSets/Main/"),
    read_voc,
    {"trainval": 5011, "test": 4952},
)
