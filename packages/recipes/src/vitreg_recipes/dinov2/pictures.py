"""Pictures without labels, wherever they lie."""

import os
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image
from vitreg_core.data.images import list_images, read_image

from vitreg_recipes.data import matching, open_photos
from vitreg_recipes.data.photos import Photos
from vitreg_recipes.data.tars import TarPhotos


@runtime_checkable
class Pictures(Protocol):
    """Pictures that can be read in any order."""

    where: str
    """Where they lie, for messages."""

    def __len__(self) -> int:
        """How many there are."""

    def name(self, index: int) -> str:
        """What a user knows a picture by."""

    def read(self, index: int) -> Image.Image:
        """Read a picture as RGB, upright.

        Raises:
            InputError: it cannot be read.
        """


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


class WithoutLabels:
    """Labelled pictures, whose labels nobody reads."""

    def __init__(self, photos: Photos) -> None:
        self.where = photos.where
        self.photos = photos

    def __len__(self) -> int:
        return len(self.photos.labels)

    def name(self, index: int) -> str:
        """What a user knows a picture by."""
        return self.photos.name(index)

    def read(self, index: int) -> Image.Image:
        """Read a picture.

        Raises:
            InputError: it cannot be read.
        """
        return self.photos.read(index)


def open_pictures(path: str) -> Pictures:
    """Find pictures: a folder (its `train`, if it has one), tars, parquet files, or a data set of the hub.

    Raises:
        InputError: there is nothing, or no image.
    """
    if Path(path).is_dir():
        folder = Path(path, "train") if Path(path, "train").is_dir() else Path(path)
        tars = sorted(folder.glob("*.tar"))
        return WithoutLabels(TarPhotos(path, tars, labelled=False)) if tars else FolderPictures(folder)
    if path.endswith(".tar"):
        return WithoutLabels(TarPhotos(path, matching(path), labelled=False))
    return WithoutLabels(open_photos(path))
