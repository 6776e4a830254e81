"""PASCAL VOC 2007 and 2012: the images of a split with the boxes of their objects, from a user's folder.

The devkit keeps its layout under several roots: as unpacked, as LOST's `datasets/VOC2007`, or one level deeper as on
Kaggle. Images come from the list of the split, never from a listing: trainval and test may share one folder.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from vitreg_core.config import nearest
from vitreg_core.errors import InputError

Year = Literal[2007, 2012]


@dataclass(frozen=True, eq=False)
class VocImage:
    """An image and its annotated objects, in the order of the file."""

    path: Path
    """The JPEG file."""
    id: str
    """The name in the split's list: 000005 or 2008_000008."""
    name: str
    """The file name that the annotation states: the key of LOST's prediction files."""
    boxes: Int[Tensor, "n 4"]
    """x0, y0, x1, y1 in half-open pixels that count from 0."""
    classes: tuple[str, ...]
    """Class name of each box."""
    difficult: Bool[Tensor, " n"]
    """Boxes marked as hard to recognise; they count in CorLoc."""
    truncated: Bool[Tensor, " n"]
    """Boxes whose object reaches beyond them."""


@dataclass(frozen=True)
class VocObject:
    """One object of an annotation file."""

    name: str
    box: tuple[int, int, int, int]
    difficult: bool
    truncated: bool


def voc_images(root: str | Path, year: Year, split: str = "trainval") -> list[VocImage]:
    """List the images of a split with all their objects, difficult and truncated ones included.

    Args:
        root: the folder that holds VOCdevkit, VOCdevkit itself, the folder VOC2007 or VOC2012 in it, or a folder
            whose sub-folders hold VOCdevkit.
        year: 2007 or 2012.
        split: name of a list in ImageSets/Main, without .txt.

    Raises:
        InputError: names the folder, list or file that is missing or broken, and what to do.
    """
    root = Path(root).expanduser()
    listing = find_list(find_folders(root, year), split)
    ids = read_list(listing)
    if not ids:
        raise InputError(f"{listing}: the list is empty; unpack VOC{year} again")
    return [read_image(listing.parents[2], image) for image in ids]


def find_folders(root: Path, year: Year) -> list[Path]:
    """Every folder at the usual levels below the root that holds this year's lists."""
    if not root.is_dir():
        problem = "is a file" if root.exists() else "no such folder"
        raise InputError(f"{root}: {problem}; give the unpacked folder that holds VOCdevkit, or VOC{year} itself")
    found = [folder for folder in places(root, f"VOC{year}") if has_lists(folder)]
    if not found:
        levels = ", ".join(str(root / level) for level in ("", f"VOC{year}", f"*/VOC{year}", f"*/VOCdevkit/VOC{year}"))
        others = sorted({folder.name for folder in places(root, "VOC20??") if has_lists(folder)} - {root.name})
        there = f"; there is {', '.join(others)}" if others else ""
        raise InputError(
            f"{root}: no VOC{year} with ImageSets/Main in it{there}; looked at {levels}; "
            f"give the folder that holds VOCdevkit, or unpack VOC{year} there"
        )
    return found


def places(root: Path, name: str) -> list[Path]:
    """Where a year's folder may be: the root itself unless it is another year's, or one to three levels below."""
    own = [] if re.fullmatch(r"VOC20\d\d", root.name) and not root.match(name) else [root]
    return own + [path for level in ("", "*/", "*/VOCdevkit/") for path in sorted(root.glob(level + name))]


def has_lists(folder: Path) -> bool:
    """Whether a folder is that of a year: a folder around it may have the same name."""
    return (folder / "ImageSets" / "Main").is_dir()


def find_list(folders: list[Path], split: str) -> Path:
    """Find the split in any of the folders: trainval and test may be unpacked side by side."""
    lists = [path for folder in folders for path in sorted((folder / "ImageSets" / "Main").glob("*.txt"))]
    for path in lists:
        if path.stem == split:
            return path
    names = sorted({path.stem for path in lists if "_" not in path.stem})  # not the lists per class
    tried = ", ".join(str(folder / "ImageSets" / "Main") for folder in folders)
    raise InputError(
        f"split {split!r}: no {split}.txt in {tried}; use {' or '.join(names) or 'a complete copy of VOC'}"
        f"{nearest(split, names)}"
    )


def read_list(path: Path) -> list[str]:
    """Names of images: the first word of each line."""
    try:
        return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable list ({error}); unpack VOC again") from None


def read_image(folder: Path, image: str) -> VocImage:
    """Read one annotation and make sure that its picture is there."""
    annotation = folder / "Annotations" / f"{image}.xml"
    picture = folder / "JPEGImages" / f"{image}.jpg"
    for path in (annotation, picture):
        if not path.is_file():
            raise InputError(f"{path}: listed in ImageSets/Main but missing; unpack {folder.name} again")
    tree = parse(annotation)
    objects = [read_object(element, annotation) for element in tree.findall("object")]
    return VocImage(
        path=picture,
        id=image,
        name=(tree.findtext("filename") or picture.name).strip(),
        boxes=torch.tensor([item.box for item in objects], dtype=torch.int64).reshape(-1, 4),
        classes=tuple(item.name for item in objects),
        difficult=torch.tensor([item.difficult for item in objects], dtype=torch.bool),
        truncated=torch.tensor([item.truncated for item in objects], dtype=torch.bool),
    )


def parse(path: Path) -> ElementTree.Element:
    """Parse an annotation file."""
    try:
        return ElementTree.parse(path).getroot()  # noqa: S314, a local file of a data set that the user chose
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:  # the last two: odd encodings
        raise InputError(f"{path}: not valid XML ({error}); unpack the annotations again") from None


def read_object(element: ElementTree.Element, path: Path) -> VocObject:
    """Read an object from its direct children only: its parts (head, hand, foot) have boxes of their own."""
    name = (element.findtext("name") or "").strip()
    if not name:
        raise InputError(f"{path}: an object has no name; unpack the annotations again")
    corners = [pixel(element, corner, path) for corner in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = corners[0] - 1, corners[1] - 1, corners[2], corners[3]  # from 1-based, inclusive
    if left >= right or top >= bottom:
        raise InputError(f"{path}: the box of a {name} is empty, {corners}; unpack the annotations again")
    return VocObject(name, (left, top, right, bottom), flag(element, "difficult"), flag(element, "truncated"))


def pixel(element: ElementTree.Element, corner: str, path: Path) -> int:
    """Read a coordinate; two files of VOC 2012 hold fractions, which are cut."""
    text = element.findtext(f"bndbox/{corner}")
    try:
        return int(float(text or ""))
    except (ValueError, OverflowError):
        raise InputError(f"{path}: bndbox/{corner} is {text!r}, not a number; unpack the annotations again") from None


def flag(element: ElementTree.Element, name: str) -> bool:
    """Read a 0 or 1 that some re-exports leave out."""
    return (element.findtext(name) or "0").strip() == "1"
