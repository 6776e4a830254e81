"""COCO with boxes: the 20k list of train2014 that object discovery is measured on, or any other images of COCO.

The list is a file of the user's; its hash is checked, since another list gives another number. Users of COCO 2017 have
the same images in train2017 under shorter names, and slightly other boxes.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_core.weights.download import cache_folder

LIST_NAME = "coco_20k_filenames.txt"
LIST_SHA256 = "74637e9b4f93f2ebef9b1f664aff53edd1f41ef08dad97bd22ce8e455052b335"
"""Of the list that LOST and TokenCut use: 19,817 lines such as train2014/COCO_train2014_000000000009.jpg."""
LEVELS = ("", "COCO", "coco", "datasets/COCO")
"""Where COCO may be below the folder that is given."""
FARTHEST = 2**30
"""Pixels; a box that reaches so far, or that is not finite, is damaged."""
NUMBER = re.compile(r"(?:.*_)?(\d+)\.(?:jpg|jpeg|png)$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class CocoImage:
    """An image and the boxes of its objects."""

    id: int
    path: Path
    boxes: Int[Tensor, "n 4"]
    """x0, y0, x1, y1 in half-open pixels, rounded as LOST does; crowds are left out."""


@dataclass(frozen=True)
class CocoSet:
    """Images by increasing number."""

    images: list[CocoImage]
    notes: list[str] = field(default_factory=list)
    """What a reader must know: which list, which annotations."""


@dataclass(frozen=True, eq=False)
class Annotations:
    """Boxes of all images of a split, grouped by image."""

    ids: Int[np.ndarray, " images"]
    """Sorted image numbers."""
    starts: Int[np.ndarray, " images_and_one"]
    """Where the boxes of each image start in `boxes`."""
    boxes: Int[np.ndarray, "boxes 4"]

    def of(self, image: int) -> Int[Tensor, "n 4"] | None:
        """Boxes of an image; None where the annotations do not know it."""
        row = int(np.searchsorted(self.ids, image))
        if row == len(self.ids) or self.ids[row] != image:
            return None
        return torch.from_numpy(self.boxes[self.starts[row] : self.starts[row + 1]])


def coco_images(root: Path, split: str = "train2014", list_file: Path | None = None, *, official: bool) -> CocoSet:
    """Find images of COCO and their boxes.

    Args:
        root: holds train2014 (or images/train2014) and annotations/instances_train2014.json, or a folder COCO does.
        split: train2014, val2014, train2017 or val2017.
        list_file: names of images, one a line; their numbers count. All images of the annotations without one.
        official: the list must be the published one, which is looked for below the root.

    Raises:
        InputError: names the folder, file, line or image number that is missing or wrong, and what to do.
    """
    if official:
        list_file = list_file or find_list(root)
        check_list(list_file)
    annotated, notes = find_annotations(root, split)
    annotations = read_annotations(annotated)
    ids = annotations.ids.tolist() if list_file is None else read_list(list_file)
    if list_file is not None:
        notes.append(f"images of {list_file}, sha256 {file_hash(list_file)}")
    images = []
    folders = image_folders(root, split)
    for image in sorted(set(ids)):
        boxes = annotations.of(image)
        if boxes is None:
            raise InputError(f"{list_file}: image {image} is not in {annotated}; give the list that belongs to it")
        images.append(CocoImage(image, find_picture(folders, image), boxes))
    if not images:
        raise InputError(f"{list_file or annotated}: 0 images; give the complete file")
    return CocoSet(images, notes)


def find_list(root: Path) -> Path:
    """The published list below a folder."""
    tried = [root / level / sub / LIST_NAME for level in LEVELS for sub in ("", "annotations")]
    for path in tried:
        if path.is_file():
            return path
    raise InputError(
        f"{root}: no {LIST_NAME} in it; put it there, or give --coco_list FILE (LOST's list of the images)"
    )


def check_list(path: Path) -> None:
    """Refuse any list but the published one."""
    found = file_hash(path)
    if found != LIST_SHA256:
        raise InputError(
            f"{path}: sha256 {found[:12]}... is not that of COCO20k ({LIST_SHA256[:12]}...); get {LIST_NAME} again, "
            "or give --dataset coco for a list of your own"
        )


def file_hash(path: Path) -> str:
    """SHA-256 of a list.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give --coco_list an existing file") from None


def read_list(path: Path) -> list[int]:
    """Image numbers of a list: the digits after the last underscore, or the whole name."""
    file_hash(path)  # so that a missing file is named
    ids = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        found = NUMBER.match(line.split()[0].rpartition("/")[2])
        if not found:
            raise InputError(
                f"{path}: line {number} is {line[:60]!r}; give names such as COCO_train2014_000000000009.jpg"
            )
        ids.append(int(found[1]))
    return ids


def find_annotations(root: Path, split: str) -> tuple[Path, list[str]]:
    """The annotation file of a split, or of the same split of 2017, which has slightly other boxes."""
    names = [split] if split.endswith("2017") else [split, split.replace("2014", "2017")]
    tried = [root / level / "annotations" / f"instances_{name}.json" for name in names for level in LEVELS]
    for path in tried:
        if path.is_file():
            other = path.stem != f"instances_{split}"
            return path, [f"boxes of {path.name}, which differ slightly from those of {split}"] if other else []
    places = ", ".join(str(path) for path in tried[: len(LEVELS)])
    raise InputError(f"{root}: no annotations of COCO {split}; looked for {places}; unpack annotations there")


def image_folders(root: Path, split: str) -> list[tuple[Path, str]]:
    """Folders that may hold the images, and what their names start with."""
    names = [split] if split.endswith("2017") else [split, split.replace("2014", "2017")]
    pairs = [
        (root / level / above / name, f"COCO_{name}_" if name.endswith("2014") else "")
        for name in names
        for level in LEVELS
        for above in ("images", "")
    ]
    found = [(folder, prefix) for folder, prefix in pairs if folder.is_dir()]
    if not found:
        raise InputError(
            f"{root}: no images of COCO {split}; looked for {pairs[0][0]}, {pairs[1][0]}; unpack them there"
        )
    return found


def find_picture(folders: list[tuple[Path, str]], image: int) -> Path:
    """The file of an image, by its number."""
    tried = [folder / f"{prefix}{image:012d}.jpg" for folder, prefix in folders]
    for path in tried:
        if path.is_file():
            return path
    raise InputError(f"image {image}: no {tried[0]}; unpack the images again")


def read_annotations(path: Path) -> Annotations:
    """Boxes by image, from a compact copy in the cache where one was made of this very file."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:24]
    copy = cache_folder() / "coco" / f"{path.stem}-{key}.npz"
    cached = read_copy(copy)
    if cached is not None:
        return cached
    annotations = group(parse(path), path)
    write_copy(copy, annotations)
    return annotations


def parse(path: Path) -> dict[str, Any]:
    """Read the JSON of the annotations."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); unpack the annotations again") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise InputError(f"{path}: no images and annotations in it; give instances_*.json of COCO")
    return content


def group(content: dict[str, Any], path: Path) -> Annotations:
    """Sort boxes by image, once, whatever their number."""
    try:
        ids = np.array(sorted({int(image["id"]) for image in content["images"]}), dtype=np.int64)
        single = [entry for entry in content["annotations"] if not entry.get("iscrowd", 0)]
        owners = np.array([int(entry["image_id"]) for entry in single], dtype=np.int64)
        sides = np.array([[float(value) for value in entry["bbox"]] for entry in single]).reshape(len(single), 4)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: a damaged entry ({type(error).__name__}: {error}); unpack it again") from None
    if not (np.abs(sides) < FARTHEST).all():
        raise InputError(f"{path}: a box of no picture's size; unpack the annotations again")
    order = np.argsort(owners, kind="stable")
    corners = np.concatenate([sides[:, :2], sides[:, :2] + sides[:, 2:]], axis=1)
    boxes = np.rint(corners[order]).astype(np.int64)  # halves to even, as LOST rounds
    known = np.isin(owners[order], ids)
    starts = np.searchsorted(owners[order][known], np.append(ids, np.iinfo(np.int64).max))
    return Annotations(ids, starts.astype(np.int64), boxes[known])


def read_copy(path: Path) -> Annotations | None:
    """A compact copy; None where there is none that can be used."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return Annotations(*(arrays[name].astype(np.int64, casting="safe") for name in ("ids", "starts", "boxes")))
    except Exception:  # a damaged copy may fail in any way, and is made again
        return None


def write_copy(path: Path, annotations: Annotations) -> None:
    """Keep a compact copy, whole or not at all; without a cache that can be written there is none."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, ids=annotations.ids, starts=annotations.starts, boxes=annotations.boxes)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
