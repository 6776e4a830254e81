"""Image files and folders, labelled or not, and the preprocessing that a checkpoint expects."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitreg_core.config import PreprocessConfig
from vitreg_core.errors import InputError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error)
"""What Pillow raises for files that are cut off or no images."""
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Preprocess:
    """From a picture to what a checkpoint reads: resize, centre crop, normalise."""

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 size size"]:
        """Prepare one picture of any size and mode, exactly as timm's evaluation transform does.

        Returns:
            Normalised pixels, `size` being `config.image_size`.
        """
        size = self.config.image_size
        shorter = int(size / self.config.crop_ratio)
        resample = FILTERS[self.config.interpolation]
        if self.config.resize == "squash":
            resized = image.convert("RGB").resize((shorter, shorter), resample)
        else:
            resized = resize_shorter(image.convert("RGB"), shorter, resample)
        corner = round if self.config.crop_corner == "round" else math.floor
        left, top = corner((resized.width - size) / 2), corner((resized.height - size) / 2)
        return self.normalize(to_tensor(resized.crop((left, top, left + size, top + size))))

    def normalize(self, pixels: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
        """Normalise pixels in 0 to 1 by the checkpoint's mean and standard deviation."""
        mean, std = (pixels.new_tensor(value).view(3, 1, 1) for value in (self.config.mean, self.config.std))
        return (pixels - mean) / std

    def denormalize(self, pixels: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
        """Undo `normalize`: pixels in 0 to 1, to be looked at."""
        mean, std = (pixels.new_tensor(value).view(3, 1, 1) for value in (self.config.mean, self.config.std))
        return pixels * std + mean


def resize_shorter(image: Image.Image, shorter: int, resample: Image.Resampling) -> Image.Image:
    """Resize so that the shorter side has this many pixels; the longer side is rounded down."""
    width, height = image.size
    if width <= height:
        return image.resize((shorter, int(shorter * height / width)), resample)
    return image.resize((int(shorter * width / height), shorter), resample)


def to_tensor(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """Pixels of an RGB picture in 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def read_image(path: Path) -> Image.Image:
    """Read one picture as RGB, without turning it by its EXIF entry.

    Raises:
        InputError: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({error}); replace or remove it") from None


def list_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted by path.

    Raises:
        InputError: the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder of images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"{folder}: 0 images found; it must hold files such as {', '.join(sorted(SUFFIXES))}")
    return paths


@dataclass(frozen=True)
class LabelledImages:
    """Image files with a class each, in the ImageFolder layout: one sub-folder per class."""

    paths: list[Path]
    labels: list[int]
    """Index into `classes` of each image."""
    classes: list[str]
    """Sub-folder names, sorted."""

    def __len__(self) -> int:
        return len(self.paths)


def labelled_images(folder: Path) -> LabelledImages:
    """Find `<class>/<image>` below a folder.

    Raises:
        InputError: the folder is missing, has no class folders, or a class folder holds no image.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder with one sub-folder of images per class")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise InputError(f"{folder}: 0 class folders found; put the images of each class into a sub-folder")
    found = [list_images(folder / name) for name in classes]
    labels = [index for index, paths in enumerate(found) for _ in paths]
    return LabelledImages([path for paths in found for path in paths], labels, classes)
