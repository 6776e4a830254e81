"""LOST on a data set: one box per image from frozen features, and how often it is right."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from vitreg_core.data.images import list_images, read_image, to_tensor
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone
from vitreg_core.precision import use_precision

from vitreg_eval.analyses.boxes import plot_boxes
from vitreg_eval.config import LostOptions
from vitreg_eval.datasets import file_record, scenes
from vitreg_eval.datasets.voc import Year, voc_images
from vitreg_eval.lost import Discovery, discover
from vitreg_eval.metrics import Metric, corloc, measure
from vitreg_eval.paths import data_folder
from vitreg_eval.results import DataRecord, Outcome, write_json

YEARS: dict[str, Year] = {"voc07": 2007, "voc12": 2012}
PICTURES = 12
ALIKE_SHARE = 0.5
"""Above this share of whole-image boxes, the reader is told."""


@dataclass(frozen=True)
class Photo:
    """One image to search, at its own size, and where its objects are."""

    name: str
    pixels: Float[Tensor, "3 height width"]
    boxes: Int[Tensor, "n 4"] | None


@dataclass(frozen=True)
class PhotoSet:
    """The images to search; read one by one."""

    data: DataRecord
    photos: Iterator[Photo]


@dataclass(frozen=True)
class Find:
    """What was found in one image; pixels are kept for the pictures only."""

    name: str
    image_size: tuple[int, int]
    boxes: Int[Tensor, "n 4"] | None
    discovery: Discovery
    pixels: Float[Tensor, "3 height width"] | None = None

    @property
    def correct(self) -> bool | None:
        """Whether the box meets a true one (IoU at least 0.5); None where there are none."""
        if self.boxes is None:
            return None
        return not self.discovery.failed and hits(self.discovery.box, self.boxes)


def run(backbone: Backbone, options: LostOptions, out: Path) -> Outcome:
    """CorLoc, 0 to 1, and diagnostics; writes boxes.json and boxes.png.

    Raises:
        InputError: missing or damaged data, an image smaller than a patch.
    """
    photo_set = open_photos(backbone, options)
    photos = tqdm(photo_set.photos, total=photo_set.data.n, desc="lost", unit="image", disable=None, leave=False)
    found = search(backbone, iter(photos), options, pictured=spread(photo_set.data.n, PICTURES))
    write_json(out / "boxes.json", [record(find) for find in found])
    draw(found).savefig(out / "boxes.png")
    metrics = evaluate(found, options.seed)
    notes = [f"boxes of all images in {out / 'boxes.json'}, pictures in {out / 'boxes.png'}"]
    share = metrics["full_image_share"].value
    if share > ALIKE_SHARE:
        notes.append(
            f"nothing but the whole image was found in {share:.0%} of the images: their {options.features} are all "
            "alike; try --features values, --center or --bias"
        )
    return Outcome(metrics, photo_set.data, notes)


def open_photos(backbone: Backbone, options: LostOptions) -> PhotoSet:
    """The images that the options name."""
    if options.images is not None:
        paths = list_images(options.images)
        photos = (Photo(path.name, to_tensor(read_image(path)), None) for path in paths)
        return PhotoSet(file_record(paths, options.images, ""), photos)
    if options.dataset == "scenes":
        return scene_photos(backbone, options)
    folder = data_folder(options.data)
    listed = voc_images(folder, YEARS[options.dataset], options.split)
    voc = (Photo(item.name, to_tensor(read_image(item.path)), item.boxes) for item in listed)
    record = file_record([item.path for item in listed], folder, options.split)
    return PhotoSet(record.model_copy(update={"name": options.dataset}), voc)


def scene_photos(backbone: Backbone, options: LostOptions) -> PhotoSet:
    """Drawn scenes, one by one."""
    image_set = scenes(backbone.preprocess, options.test_images, options.seed, "test")

    def photos() -> Iterator[Photo]:
        for number, batch in enumerate(image_set.batches()):
            for index, (image, boxes) in enumerate(zip(batch.images, batch.targets["boxes"], strict=True)):
                yield Photo(f"scene-{number}-{index}", backbone.preprocess.denormalize(image), boxes[boxes.any(dim=-1)])

    return PhotoSet(image_set.data, photos())


def search(
    backbone: Backbone, photos: Iterator[Photo], options: LostOptions, pictured: Sequence[int] = ()
) -> list[Find]:
    """Search image by image; neighbours of one size share a forward pass. `pictured` images keep their pixels."""
    found: list[Find] = []
    for _, group in groupby(photos, key=lambda photo: photo.pixels.shape):
        while part := list(islice(group, options.batch_size)):
            for photo, discovery in zip(part, discover_all(backbone, part, options), strict=True):
                pixels = photo.pixels if len(found) in pictured else None
                height, width = photo.pixels.shape[-2:]
                found.append(Find(photo.name, (height, width), photo.boxes, discovery, pixels))
    return found


@torch.no_grad()
def discover_all(backbone: Backbone, photos: list[Photo], options: LostOptions) -> Iterator[Discovery]:
    """LOST in photos of one size, with one forward pass."""
    images = backbone.preprocess.normalize(torch.stack([photo.pixels for photo in photos]))
    if min(images.shape[-2:]) < backbone.patch_size:
        size = "x".join(map(str, images.shape[-2:]))
        raise InputError(f"{photos[0].name}: {size} pixels are less than one patch of {backbone.patch_size}; remove it")
    padded = pad_to_patches(images, backbone.patch_size).to(backbone.device)
    with use_precision(options.precision, backbone.device):
        facet = getattr(backbone.qkv(padded, options.layer), options.features)
    features = rearrange(facet[:, :, backbone.num_prefix_tokens :], "b h p k -> b p (h k)").float()
    settings = options.model_dump(include={"k_patches", "bias", "center", "normalize"})
    grid = (padded.shape[-2] // backbone.patch_size, padded.shape[-1] // backbone.patch_size)
    height, width = images.shape[-2:]
    for patches in features:
        yield discover(patches, grid, backbone.patch_size, (height, width), **settings)


def pad_to_patches(images: Float[Tensor, "b 3 height width"], patch_size: int) -> Float[Tensor, "b 3 h w"]:
    """Zero-pad normalised images on the bottom and the right up to whole patches, as LOST does."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % patch_size, 0, -height % patch_size))


def evaluate(found: list[Find], seed: int) -> dict[str, Metric]:
    """CorLoc over the images with true boxes, the same for the whole image as box, and signs of trouble."""
    with_boxes = [find for find in found if find.boxes is not None and len(find.boxes)]
    metrics = {}
    if with_boxes:
        whole = [hits((0, 0, *reversed(find.image_size)), find.boxes) for find in with_boxes if find.boxes is not None]
        metrics["corloc"] = measure(torch.tensor([bool(find.correct) for find in with_boxes]), seed=seed)
        metrics["corloc_whole_image"] = measure(torch.tensor(whole), seed=seed)
    border = [find.discovery.seed_on_border for find in found]
    metrics["full_image_share"] = measure(torch.tensor([find.discovery.full_image for find in found]), seed=seed)
    metrics["seed_on_border_share"] = measure(torch.tensor(border), seed=seed)
    return metrics


def hits(box: tuple[int, ...], boxes: Tensor) -> bool:
    """Whether a box meets one of the true boxes."""
    return bool(corloc(torch.tensor([box]), [boxes])[0])


def record(find: Find) -> dict[str, object]:
    """One image for boxes.json."""
    return {
        "image": find.name,
        "box": [int(value) for value in find.discovery.box],
        "correct": find.correct,
        "seed": find.discovery.seed,
        "seed_degree_share": round(find.discovery.degree_share, 4),
        "mask_share": round(find.discovery.mask_share, 4),
        "object_share": round(find.discovery.component_share, 4),
        "failed": find.discovery.failed,
    }


def spread(total: int, count: int) -> list[int]:
    """Up to `count` indices below `total`, evenly spread."""
    return [index * total // count for index in range(count)] if total > count else list(range(total))


def draw(found: list[Find]) -> Figure:
    """The images that kept their pixels, with true boxes and what was found."""
    shown = [find for find in found if find.pixels is not None]
    return plot_boxes(
        [find.pixels.permute(1, 2, 0).numpy() for find in shown if find.pixels is not None],
        [find.discovery.box for find in shown],
        [[] if find.boxes is None else find.boxes.tolist() for find in shown],
    )
