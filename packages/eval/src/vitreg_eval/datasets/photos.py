"""Images to search for objects, at their own size, with the boxes of their objects where they are known."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from vitreg_core.data.images import ORIENTATION, list_images, read_image, to_rgb, to_tensor
from vitreg_core.data.images import Preprocess as Preprocess
from vitreg_core.errors import InputError

from vitreg_eval.config import LostOptions
from vitreg_eval.datasets import file_record, scenes
from vitreg_eval.datasets.coco20k import coco_images
from vitreg_eval.datasets.voc import VocImage, Year, voc_images
from vitreg_eval.paths import data_folder
from vitreg_eval.results import DataRecord

YEARS: dict[str, Year] = {"voc07": 2007, "voc12": 2012}
KNOWN_COUNTS = {
    ("voc07", "train"): 2501,
    ("voc07", "val"): 2510,
    ("voc07", "trainval"): 5011,
    ("voc07", "test"): 4952,
    ("voc12", "train"): 5717,
    ("voc12", "val"): 5823,
    ("voc12", "trainval"): 11540,
    ("coco20k", "train2014"): 19817,
}
"""Images of the whole sets."""
TURNED = {5, 6, 7, 8}
"""Values of the EXIF orientation that swap width and height."""

Boxes = Int[Tensor, "n 4"]


@dataclass(frozen=True, eq=False)
class Photo:
    """One image in memory, and where its objects are."""

    name: str
    pixels: Float[Tensor, "3 height width"]
    """0 to 1."""
    boxes: Boxes | None
    """x0, y0, x1, y1 in half-open pixels; None where nobody knows."""
    image_id: int = 0
    """What COCO-style results call the image."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


@dataclass(frozen=True, eq=False)
class PhotoFile:
    """One image on disk, read when it is asked for its pixels; otherwise as `Photo`."""

    name: str
    path: Path
    boxes: Boxes | None
    image_id: int = 0
    upright: bool = False
    """Turn the picture as its EXIF entry says. Boxes of data sets count the pixels as they are stored."""

    @property
    def pixels(self) -> Float[Tensor, "3 height width"]:
        """The picture, 0 to 1.

        Raises:
            InputError: the file cannot be read as an image.
        """
        return to_tensor(read_image(self.path) if self.upright else read_stored(self.path))

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, from the head of the file.

        Raises:
            InputError: the file cannot be read as an image.
        """
        with opened(self.path) as image:
            return (image.width, image.height) if self.upright and on_its_side(image) else (image.height, image.width)


@dataclass(frozen=True)
class PhotoSet:
    """The images to search, in the order in which results are given."""

    data: DataRecord
    photos: Iterable[Photo | PhotoFile]
    notes: list[str] = field(default_factory=list)
    """What a reader must know of the set: a subset, images left out."""


def on_its_side(image: Image.Image) -> bool:
    """Whether the EXIF entry says that the camera was turned; damaged EXIF data say nothing."""
    try:
        return image.getexif().get(ORIENTATION) in TURNED
    except Exception:  # as in `opened`
        return False


def opened(path: Path) -> Image.Image:
    """Open a picture without decoding it.

    Raises:
        InputError: no such file, or no known format.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # many good pictures have odd metadata
            return Image.open(path)
    except Exception as error:  # Pillow's readers raise whatever damage makes them stumble over
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a readable image ({reason}); replace or remove it") from None


def read_stored(path: Path) -> Image.Image:
    """Read one picture as RGB, as it is stored: boxes of data sets know nothing of EXIF entries.

    Raises:
        InputError: the file cannot be read as an image.
    """
    with opened(path) as image:
        try:
            with warnings.catch_warnings(action="ignore"):
                image.load()
                return to_rgb(image)
        except Exception as error:  # as above
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise InputError(f"{path}: not a readable image ({reason}); replace or remove it") from None


def open_photos(preprocess: Preprocess, options: LostOptions) -> PhotoSet:
    """The images that the options name.

    Raises:
        InputError: missing or damaged data.
    """
    if options.images is not None:
        return folder_photos(options.images)
    if options.dataset == "scenes":
        return scene_photos(preprocess, options)
    folder = data_folder(options.data)
    found = coco_photos(folder, options) if options.dataset.startswith("coco") else voc_photos(folder, options)
    whole = KNOWN_COUNTS.get((options.dataset, found.data.split))
    if whole is not None and not options.no_hard and found.data.n != whole:
        found.notes.append(
            f"{found.data.n} images: a subset of {options.dataset} {found.data.split}, which has {whole}; "
            "not comparable with published numbers"
        )
    return found


def folder_photos(folder: Path) -> PhotoSet:
    """All photos below a folder, without boxes; names are paths in it."""
    paths = list_images(folder)
    photos = [
        PhotoFile(path.relative_to(folder).as_posix(), path, None, number, upright=True)
        for number, path in enumerate(paths, 1)
    ]
    return PhotoSet(file_record(paths, folder, ""), photos)


def scene_photos(preprocess: Preprocess, options: LostOptions) -> PhotoSet:
    """Drawn scenes, one by one."""
    image_set = scenes(preprocess, options.test_images, options.seed, "test")
    drawn = (pair for batch in image_set.batches() for pair in zip(batch.images, batch.targets["boxes"], strict=True))
    photos = (
        Photo(f"scene-{number}", preprocess.denormalize(image), boxes[boxes.any(dim=-1)], number)
        for number, (image, boxes) in enumerate(drawn, 1)
    )
    return PhotoSet(image_set.data, photos)


def voc_photos(folder: Path, options: LostOptions) -> PhotoSet:
    """A split of PASCAL VOC, with or without the boxes that are hard."""
    split = options.split or "trainval"
    listed = voc_images(folder, YEARS[options.dataset], split)
    boxes = [kept_boxes(item) if options.no_hard else item.boxes for item in listed]
    kept = [(item, own) for item, own in zip(listed, boxes, strict=True) if len(own) or not options.no_hard]
    if not kept:
        raise InputError(f"--no_hard leaves none of the {len(listed)} images of {split} with a box; leave it out")
    numbers = image_numbers([item.id for item, _ in kept])
    photos = [PhotoFile(item.name, item.path, own, number) for (item, own), number in zip(kept, numbers, strict=True)]
    record = file_record([item.path for item, _ in kept], folder, split)
    notes = []
    if options.no_hard:
        dropped = sum(len(item.boxes) for item in listed) - sum(len(own) for _, own in kept)
        notes = [f"--no_hard left out {dropped} boxes, and {len(listed) - len(kept)} of {len(listed)} images with them"]
    return PhotoSet(record.model_copy(update={"name": options.dataset}), photos, notes)


def image_numbers(names: list[str]) -> list[int]:
    """What COCO-style results call images: the digits of VOC's names, or places in the list where some have others."""
    digits = [name.replace("_", "") for name in names]
    if all(word.isdecimal() for word in digits) and len(set(map(int, digits))) == len(digits):
        return [int(word) for word in digits]
    return list(range(1, len(names) + 1))


def kept_boxes(item: VocImage) -> Boxes:
    """Boxes that are neither difficult nor truncated."""
    return item.boxes[~(item.difficult | item.truncated)]


def coco_photos(folder: Path, options: LostOptions) -> PhotoSet:
    """Images of COCO, in the order of their numbers; names are numbers, as LOST has them."""
    found = coco_images(folder, options.split or "train2014", options.coco_list, official=options.dataset == "coco20k")
    photos = [PhotoFile(str(image.id), image.path, image.boxes, image.id) for image in found.images]
    record = file_record([image.path for image in found.images], folder, options.split or "train2014")
    return PhotoSet(record.model_copy(update={"name": options.dataset}), photos, found.notes)
