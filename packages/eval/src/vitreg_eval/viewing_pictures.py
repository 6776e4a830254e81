"""The pictures of the viewer: drawn scenes, listed files of a folder, and uploads within limits."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from einops import rearrange
from jaxtyping import Float
from numpy import ndarray
from PIL import Image
from torch import Tensor
from vitreg_core.data.images import Preprocess, decode_image, list_images, read_image
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError

from vitreg_eval.lru import Cache

MOST_BYTES = 20 * 2**20
"""Size of an uploaded file."""
MOST_PIXELS = 50_000_000
"""Pixels of a picture: a phone's best camera; decoded they take some 300 MB for a moment."""
MOST_LISTED = 2000
"""Files of a folder that are offered."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats of uploads; others, such as EPS, start programs or read other files."""
SCENES = 8
SCENES_SEED = 5
CALIBRATION_SEED = 77


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture, as each model reads it."""

    key: str
    """Under which `Pictures.open` finds it again."""
    name: str
    inputs: tuple[Float[Tensor, "3 height width"], ...]
    """Normalised pixels for each model, in the order of the models."""

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""
        return sum(one.nbytes for one in self.inputs)


class Pictures:
    """What can be looked at. Safe to use from several threads."""

    def __init__(self, preprocesses: Sequence[Preprocess], folder: Path | None = None, *, most: int = 2**27) -> None:
        """Args: preprocessing of each model; a folder to offer the pictures of; bytes of pixels to keep.

        Raises:
            InputError: the folder is missing or holds no image.
        """
        self.preprocesses = tuple(preprocesses)
        files = [] if folder is None else list_images(folder)
        self.listed = len(files)
        """Pictures in the folder; the first `MOST_LISTED` of them are offered."""
        self.files = {f"file {index}": path for index, path in enumerate(files[:MOST_LISTED])}
        self.names = {f"scene {index}": f"drawn scene {index}" for index in range(SCENES)}
        self.names |= {key: str(path.relative_to(folder or path)) for key, path in self.files.items()}
        self.kept: Cache[Picture] = Cache(most)
        self.decoding = Lock()  # one large picture in memory at a time

    def open(self, key: str) -> Picture:
        """The picture under a key of `names`, or of an upload that is still kept.

        Raises:
            InputError: no such key, an upload that was dropped meanwhile, or a file that cannot be read.
        """
        found = self.kept.get(key)
        return self.keep(self.read(key)) if found is None else found

    def add(self, path: Path) -> Picture:
        """Take an uploaded file.

        Raises:
            InputError: too large a file, too many pixels, or no image; the message names the file, not its folder.
        """
        data = checked_bytes(path)
        key = f"upload {hashlib.sha256(data).hexdigest()}"
        found = self.kept.get(key)
        if found is not None:
            return found
        with self.decoding:
            return self.keep(self.prepare(key, path.name, decode_image(data, path.name)))

    def keep(self, picture: Picture) -> Picture:
        """Remember a picture."""
        self.kept.put(picture.key, picture)
        return picture

    def read(self, key: str) -> Picture:
        """Read a picture that can be read at any time."""
        if key in self.files:
            with self.decoding:
                check_pixels(self.files[key], self.names[key])
                return self.prepare(key, self.names[key], read_image(self.files[key]))
        if key not in self.names:
            raise InputError("this photo is no longer in memory; upload it again, or choose another picture")
        return Picture(key, self.names[key], tuple(self.scene(key, one) for one in self.preprocesses))

    def prepare(self, key: str, name: str, image: Image.Image) -> Picture:
        """A picture as the models read it; one of few pixels is enlarged."""
        return Picture(key, name, tuple(preprocess(image) for preprocess in self.preprocesses))

    def scene(self, key: str, preprocess: Preprocess) -> Float[Tensor, "3 height width"]:
        """The drawn scene of a key, at the size of a model."""
        number = list(self.names).index(key)
        image = draw_scenes(SCENES, SCENES_SEED, image_size=preprocess.config.image_size).image[number]
        return preprocess.normalize(image)

    def pixels(self, picture: Picture, model: int = 0) -> Float[ndarray, "height width 3"]:
        """What a model sees of a picture, 0 to 1."""
        pixels = self.preprocesses[model].denormalize(picture.inputs[model]).clamp(0, 1)
        return rearrange(pixels, "c height width -> height width c").numpy()

    def calibration(self, model: int, count: int) -> Float[Tensor, "b 3 height width"]:
        """Pictures to find a model's register neurons on: of the folder, evenly spread, or as many drawn scenes.

        Scenes stand in where fewer than half as many files can be read.
        """
        preprocess, paths = self.preprocesses[model], list(self.files.values())
        taken = min(count, len(paths))
        inputs = []
        for path in (paths[index * len(paths) // taken] for index in range(taken)):
            try:
                check_pixels(path, path.name)
                inputs.append(preprocess(read_image(path)))
            except InputError:
                continue
        if 2 * len(inputs) >= count:
            return torch.stack(inputs)
        return preprocess.normalize(draw_scenes(count, CALIBRATION_SEED, image_size=preprocess.config.image_size).image)


def checked_bytes(path: Path) -> bytes:
    """The bytes of a file that may be decoded.

    Raises:
        InputError: too large a file, too many pixels, or no image.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise InputError(f"{path.name}: {size / 2**20:.0f} MB; give a photo of at most {MOST_BYTES // 2**20} MB")
    check_pixels(path, path.name)
    return path.read_bytes()


def check_pixels(path: Path, name: str) -> None:
    """Refuse a picture by its header, before anything of its size is in memory.

    Raises:
        InputError: too many pixels, or no image of a known format.
    """
    most = f"give a photo of at most {MOST_PIXELS // 10**6} megapixels"
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise InputError(f"{name}: far too many pixels; {most}") from None
    except Exception:  # Pillow's readers raise whatever damage makes them stumble over
        raise InputError(f"{name}: not a readable image; give a photo as JPEG, PNG or WebP") from None
    if width * height > MOST_PIXELS:
        raise InputError(f"{name}: {width:,} x {height:,} pixels; {most}")
