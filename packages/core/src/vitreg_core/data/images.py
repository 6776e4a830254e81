"""Image files and folders, labelled or not, and the preprocessing that a checkpoint expects."""

import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vitreg_core.config import PreprocessConfig
from vitreg_core.errors import InputError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
LONGEST = 100
"""How many times as long as wide a picture may be before its ends, which no crop keeps, are cut off first."""
ORIENTATION = 0x0112
"""The EXIF entry that says how the camera was held."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Preprocess:
    """From a picture to what a checkpoint reads: resize, centre crop, normalise."""

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 size size"]:
        """Prepare one picture of any size and mode, exactly as timm's evaluation transform does.

        A picture more than 100 times as long as wide loses its ends first, or resizing it could fill the memory.

        Returns:
            Normalised pixels, `size` being `config.image_size`.
        """
        size = self.config.image_size
        shorter = int(size / self.config.crop_ratio)
        resample = FILTERS[self.config.interpolation]
        if self.config.resize == "squash":
            resized = image.convert("RGB").resize((shorter, shorter), resample)
        else:
            resized = resize_shorter(cut_ends(image.convert("RGB")), shorter, resample)
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


def cut_ends(image: Image.Image) -> Image.Image:
    """The middle of a picture that is over `LONGEST` times as long as wide; any other picture as it is."""
    width, height = (min(side, LONGEST * min(image.size)) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """Pixels of an RGB picture in 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def read_image(path: Path) -> Image.Image:
    """Read one picture as RGB, upright, 8 bits per channel.

    The EXIF entry of cameras turns it. 16 bits become 8 by their high byte, and transparency is dropped, keeping the
    colours below it, as timm and torchvision do. Of an animation the first frame counts; the name does not matter.

    Raises:
        InputError: the file cannot be read as an image.
    """
    return read_rgb(path, str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Read one picture from the bytes of its file, as `read_image` does; the name is for the message.

    Raises:
        InputError: the bytes are no image.
    """
    return read_rgb(io.BytesIO(data), name)


def read_rgb(file: Path | io.BytesIO, name: str) -> Image.Image:
    """Read one picture as RGB, upright."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:  # many good ones have odd metadata
            image.load()
            return to_rgb(upright(image))
    except Exception as error:  # Pillow's readers raise whatever damage makes them stumble over
        known = not isinstance(error, UnidentifiedImageError)
        reason = str(error).partition("\n")[0] or type(error).__name__ if known else "no known format"
        raise InputError(f"{name}: not a readable image ({reason}); replace or remove it") from None


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF entry says; damaged EXIF data turn nothing."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # as above
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Pixels as RGB; Pillow alone would clip 16 bits to the darkest 256th of their range."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # or Pillow warns
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


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
    """Find `<class>/<image>` below a folder; hidden folders are no classes.

    Raises:
        InputError: the folder is missing, has no class folders, or a class folder holds no image.
    """
    classes = class_folders(folder)
    if not classes:
        bare = sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
        loose = f", and {bare} images without a class" if bare else ""
        raise InputError(f"{folder}: 0 class folders found{loose}; put the images of each class into a sub-folder")
    found = [list_images(folder / name) for name in classes]
    labels = [index for index, paths in enumerate(found) for _ in paths]
    return LabelledImages([path for paths in found for path in paths], labels, classes)


def class_folders(folder: Path) -> list[str]:
    """Names of the sub-folders, sorted, without hidden ones.

    Raises:
        InputError: the folder is missing or cannot be opened.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder with one sub-folder of images per class")
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be opened ({error.strerror}); give a folder that you may read") from None
