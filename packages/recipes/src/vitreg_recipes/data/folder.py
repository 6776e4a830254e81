"""A folder with one sub-folder of images per class."""

import os
from pathlib import Path

import numpy as np
from PIL import Image
from vitreg_core.data.images import labelled_images, read_image


class FolderPhotos:
    """Image files in class folders; the paths are kept as bytes, which workers share with their parent.

    Raises:
        InputError: no class folders, or one without images.
    """

    def __init__(self, folder: Path) -> None:
        found = labelled_images(folder)
        self.folder = folder
        self.where = str(folder)
        self.classes = found.classes
        self.labels = np.array(found.labels)
        self.paths = np.array([os.fsencode(path.relative_to(folder)) for path in found.paths])

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """Path of a picture."""
        return self.folder / os.fsdecode(self.paths[index])

    def name(self, index: int) -> str:
        """Path of a picture, as text."""
        return str(self.path(index))

    def read(self, index: int) -> Image.Image:
        """Read a picture.

        Raises:
            InputError: it cannot be read.
        """
        return read_image(self.path(index))
