"""Pictures without labels, wherever they lie."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image
from tqdm import tqdm
from vitreg_core.data.images import SUFFIXES, decode_image, list_images, read_image
from vitreg_core.errors import InputError

from vitreg_recipes.config import SCENES
from vitreg_recipes.data import HUB, matching
from vitreg_recipes.data.reading import Pictures
from vitreg_recipes.data.tables import TableImages, load
from vitreg_recipes.data.tars import cached, member_name, members, read_bytes, split_key


class FolderPictures:
    """All image files below a folder; the paths are kept as bytes, which workers share with their parent.

    Raises:
        InputError: the folder holds no image.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self.folder = folder
        self.paths = np.array([os.fsencode(path.relative_to(folder)) for path in list_images(folder)])

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Path of a picture."""
        return str(self.folder / os.fsdecode(self.paths[index]))

    def read(self, index: int) -> Image.Image:
        """Read a picture.

        Raises:
            InputError: it cannot be read.
        """
        return read_image(Path(self.name(index)))


class TarPictures:
    """All images inside some tars, whatever lies beside them.

    Raises:
        InputError: a tar is damaged, or holds no image.
    """

    def __init__(self, where: str, shards: list[Path]) -> None:
        self.where = where
        self.shards = shards
        self.places = cached(Places, shards, "images", lambda: find_places(shards))

    def __len__(self) -> int:
        return len(self.places.shards)

    def name(self, index: int) -> str:
        """Tar and member."""
        return member_name(self.shards[self.places.shards[index]], self.places.offsets[index])

    def read(self, index: int) -> Image.Image:
        """Read a picture by its place in its tar.

        Raises:
            InputError: it cannot be read.
        """
        shard = self.shards[self.places.shards[index]]
        return decode_image(read_bytes(shard, self.places.offsets[index], self.places.sizes[index]), str(shard))


class Places(NamedTuple):
    """Where the images of some tars lie."""

    shards: Int[np.ndarray, " n"]
    """Which tar holds each image."""
    offsets: Int[np.ndarray, " n"]
    """First byte of each image."""
    sizes: Int[np.ndarray, " n"]
    """Bytes of each image."""


def find_places(shards: list[Path]) -> Places:
    """Read the headers of all tars."""
    found: list[tuple[int, int, int]] = []
    for number, shard in enumerate(tqdm(shards, "reading the headers of the tars", unit="tar", disable=None)):
        inside = [member for member, _ in members(shard, ()) if split_key(member.name)[1] in SUFFIXES]
        if not inside:
            raise InputError(f"{shard}: 0 images found; it must hold files such as {', '.join(sorted(SUFFIXES))}")
        found += [(number, member.offset_data, member.size) for member in inside]
    return Places(*np.array(found).T)


def open_pictures(path: str) -> Pictures:
    """Find pictures: a folder (its `train`, if it has one), tars, parquet files, or a data set of the hub.

    Raises:
        InputError: there is nothing, or no image.
    """
    if Path(path).is_dir():
        folder = Path(path, "train") if Path(path, "train").is_dir() else Path(path)
        tars = sorted(folder.rglob("*.tar"))
        return TarPictures(path, tars) if tars else FolderPictures(folder)
    if path.startswith(HUB):
        return TableImages(path, load(path, path.removeprefix(HUB), None))
    if path.endswith(".tar"):
        return TarPictures(path, matching(path))
    if path.endswith(".parquet"):
        return TableImages(path, load(path, "parquet", [str(file) for file in matching(path)]))
    raise InputError(
        f"data.path={path}: no such folder; give {SCENES}, a folder of images, hub:org/name, or shards such as "
        "'shards/*.tar' or 'shards/*.parquet', in quotes"
    )
