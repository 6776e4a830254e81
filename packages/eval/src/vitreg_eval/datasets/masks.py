"""Pictures with a class for every pixel: what reads them, and any pair of folders `images` and `annotations`."""

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import Image
from torch import Tensor
from vitreg_core.data.images import list_images, read_image
from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import IGNORE, Pairs
from vitreg_eval.results import DataRecord

SPLITS = {"train": ("training", "train"), "val": ("validation", "val", "valid", "test")}
"""What the folders of a split are called."""
IMAGES = ("images",)
ANNOTATIONS = ("annotations", "masks", "labels")
SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
"""Of files that keep classes exactly."""
MOST = 255
"""Classes that a mask of 8 bits can tell apart, beside `IGNORE`."""
CLASSES_FILE = "classes.txt"

Table = Mapping[int, int]
"""From the values in the files to classes, or `IGNORE`; any other value is an error."""


@dataclass(frozen=True)
class MaskSet:
    """One split of a segmentation data set."""

    pairs: Pairs
    """Pictures and masks of classes from 0, `IGNORE` where a pixel does not count."""
    classes: tuple[str, ...]
    """Names of the classes, in order."""


# Reading


def mask_pairs(files: Sequence[tuple[Path, Path]], table: Table, root: Path, name: str, split: str) -> Pairs:
    """Pictures and masks from their files, read one by one.

    Raises:
        InputError: no files, or one that is missing; while reading, a file that cannot be read or does not fit.
    """
    if not files:
        raise InputError(f"{root}: 0 images in the {split} split of {name}; unpack it again")
    return Pairs(
        data=DataRecord(name=name, split=split, n=len(files), hash=listing_hash(files, root)),
        read=lambda index: read_pair(*files[index], table),
        names=[str(image) for image, _ in files],
    )


def listing_hash(files: Sequence[tuple[Path, Path]], root: Path) -> str:
    """SHA-256 over the names and sizes of images and masks.

    Raises:
        InputError: one of them is missing.
    """
    digest = hashlib.sha256()
    for path in (path for pair in files for path in pair):
        try:
            digest.update(f"{os.path.relpath(path, root)} {path.stat().st_size}\n".encode())
        except OSError:
            raise InputError(
                f"{path}: no such file; each image needs its mask, so add it or remove the other"
            ) from None
    return digest.hexdigest()


def read_pair(image: Path, mask: Path, table: Table) -> tuple[Image.Image, UInt8[Tensor, "height width"]]:
    """A picture and the class of each pixel.

    Raises:
        InputError: a file cannot be read, or the mask has another size or values that name no class.
    """
    picture, classes = read_image(image), read_mask(mask, table)
    height, width = classes.shape
    if (width, height) != picture.size:
        raise InputError(
            f"{mask}: {width} x {height} pixels, its image {image.name} has {picture.width} x {picture.height}; "
            "give the mask at the size of its image"
        )
    return picture, classes


def read_mask(path: Path, table: Table) -> UInt8[Tensor, "height width"]:
    """The class of each pixel of a mask.

    Raises:
        InputError: the file cannot be read, is coded by colour, or has values that name no class.
    """
    values = read_values(path)
    found = np.unique(values)
    wrong = [int(value) for value in found if int(value) not in table]
    if wrong:
        largest = max((value for value in table if value != IGNORE), default=0)
        count = int((values == wrong[0]).sum())
        raise InputError(
            f"{path}: {count} pixels have the value {wrong[0]}, which names no class; values are "
            f"0 to {largest}, and {IGNORE} for pixels that do not count"
        )
    lookup = np.full(int(found.max(initial=0)) + 1, IGNORE, dtype=np.uint8)
    for value in found:
        lookup[value] = table[int(value)]
    return torch.from_numpy(lookup[values])


def read_values(path: Path) -> Shaped[np.ndarray, "height width"]:
    """The values of a mask file as they stand there; of a palette, the indices.

    Raises:
        InputError: the file cannot be read, or is coded by colour.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as mask:
            mask.load()
            values = np.array(mask)
    except Exception as error:  # Pillow's readers raise whatever damage makes them stumble over
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a readable mask ({reason}); replace it") from None
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise InputError(
            f"{path}: a mask of mode {mask.mode}, coded by colour; give one channel of class numbers (mode L or P)"
        )
    return values.astype(np.int64)


# Folders


def open_masks(root: Path, split: str, *, ignore_zero: bool = False) -> MaskSet:
    """A split of a folder that holds `images` and `annotations` (or `masks`, `labels`), in either order of nesting.

    Args:
        root: holds `images/<split>/x.jpg` and `annotations/<split>/x.png`, or `<split>/images/x.jpg` and so on;
            `classes.txt`, where it is there, names the classes.
        split: `train` or `val`; their folders may be called `training`, `validation` and the like.
        ignore_zero: whether the value 0 does not count and class 0 is the value 1.

    Raises:
        InputError: a folder or a mask is missing, or there is no image.
    """
    pictures, annotations = find_folder(root, IMAGES, split), find_folder(root, ANNOTATIONS, split)
    files = [(image, mask_of(image, pictures, annotations)) for image in list_images(pictures)]
    names = class_names(root)
    if names is None:
        largest = largest_value([mask for _, mask in split_files(root)])
        check_count(largest + 1, root)
        names = tuple(f"class {number}" for number in range(largest + 1))
    classes = names[1:] if ignore_zero else names
    check_count(len(classes), root)
    table = {number + ignore_zero: number for number in range(len(classes))} | {IGNORE: IGNORE}
    if ignore_zero:
        table[0] = IGNORE
    return MaskSet(mask_pairs(files, table, root, root.name, split), classes)


def split_files(root: Path) -> list[tuple[Path, Path]]:
    """Images and masks of the training split, which decides what classes there are."""
    pictures, annotations = find_folder(root, IMAGES, "train"), find_folder(root, ANNOTATIONS, "train")
    return [(image, mask_of(image, pictures, annotations)) for image in list_images(pictures)]


def find_folder(root: Path, kinds: Sequence[str], split: str) -> Path:
    """The folder of images or of masks of a split.

    Raises:
        InputError: there is none.
    """
    for kind in kinds:
        for name in SPLITS[split]:
            for folder in (root / kind / name, root / name / kind):
                if folder.is_dir():
                    return folder
    raise InputError(
        f"{root}: no {kinds[0]}/{SPLITS[split][0]} or {SPLITS[split][1]}/{kinds[0]} in it; give the folder that holds "
        f"images and annotations of {' and '.join(SPLITS)}"
    )


def mask_of(image: Path, pictures: Path, annotations: Path) -> Path:
    """The mask of an image: same name, another ending.

    Raises:
        InputError: there is none.
    """
    stem = annotations / image.relative_to(pictures).with_suffix("")
    for suffix in SUFFIXES:
        path = stem.with_name(stem.name + suffix)
        if path.is_file():
            return path
    raise InputError(f"{image}: its mask {stem.name}.png is not in {stem.parent}; add it or remove the image")


def class_names(root: Path) -> tuple[str, ...] | None:
    """Names in classes.txt: one on each line, or lines of index, tab, ..., tab, name; None without the file.

    Raises:
        InputError: the file cannot be read, or its indices do not count from 0.
    """
    path = root / CLASSES_FILE
    if not path.is_file():
        return None
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable text ({error}); write it again or remove it") from None
    if not any("\t" in line for line in lines):
        return tuple(line.strip() for line in lines)
    rows = [line.split("\t") for line in lines]
    numbered = [(int(first), rest[-1].strip()) for first, *rest in rows if rest and first.strip().isdecimal()]
    if [number for number, _ in numbered] != list(range(len(numbered))):
        raise InputError(f"{path}: the numbers before the names do not count 0, 1, 2, ...; write it again or remove it")
    return tuple(name for _, name in numbered)


def largest_value(masks: Sequence[Path]) -> int:
    """The highest class number in any mask."""
    tops = [values[values != IGNORE].max(initial=0) for values in map(read_values, masks)]
    return int(max(tops, default=0))


def check_count(classes: int, root: Path) -> None:
    """Refuse a number of classes that cannot be learned or kept."""
    if not 2 <= classes <= MOST:
        raise InputError(f"{root}: {classes} classes; give masks of 2 to {MOST} classes, one number per pixel")
