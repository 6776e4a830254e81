"""Search many images of any size for objects: batched by padded size, decoded ahead, results as they come."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone
from vitreg_core.precision import use_precision

from vitreg_eval.config import LostOptions
from vitreg_eval.config.lost import Facet
from vitreg_eval.datasets.photos import Photo, PhotoFile
from vitreg_eval.discovery import Discovery, View, check_finite
from vitreg_eval.facets import Place, Read, read_places, smooth_outliers
from vitreg_eval.lost import LostDiscovery, discover_all, prepare
from vitreg_eval.methods import METHODS, Method
from vitreg_eval.prefetch import in_order

WINDOW = 4096
"""Images among which those of one padded size are brought together."""
HELD_BYTES = 2**26
"""Pixels that a window of drawn images may hold."""
READERS = 2
"""Threads that decode; one keeps up with a ViT-S on a CPU."""
TOKENS_ON_CPU = 4096
"""Patches of a forward pass on a CPU: more leave its caches and gain nothing."""

TOKENS_AT_ONCE = 2**15
"""Patches that LOST searches at once on a GPU: a block of their Gram matrices is some 100 MB."""


class Setting(NamedTuple):
    """What a sweep varies."""

    layer: int
    features: Facet
    bias: float


class Item(NamedTuple):
    """An image and its place in the set."""

    number: int
    photo: Photo | PhotoFile


@dataclass(frozen=True)
class Finds:
    """What was found in one image, with each setting in turn."""

    item: Item
    found: Sequence[Discovery]


def settings_of(options: LostOptions) -> list[Setting]:
    """The setting of the options, then those of the sweep."""
    first = Setting(options.layer, options.features, options.bias)
    if not options.sweep:
        return [first]
    facets = options.facets or (options.features,)
    grid = [Setting(layer, facet, bias) for facet in facets for layer in options.layers for bias in options.biases]
    return list(dict.fromkeys([first, *grid]))


def search_items(backbone: Backbone, items: Iterable[Item], options: LostOptions) -> Iterator[Finds]:
    """Search images in the order that suits the machine; `Item.number` tells where each belongs.

    Raises:
        InputError: an image that cannot be read or is smaller than a patch, features that are not finite.
    """
    method = method_of(options)
    if method.needs == "nothing":
        for item in items:
            yield Finds(item, [method.find(bare_view(backbone, item), **own_settings(method, options))])
        return
    batches = (
        batch
        for window in windows(items)
        for batch in batches_of(window, backbone.patch_size, batch_size(backbone, options))
    )

    def read(batch: list[Item]) -> tuple[list[Item], Float[Tensor, "b 3 height width"]]:
        return batch, torch.stack([padded_pixels(backbone, item) for item in batch])

    for batch, images in in_order(read, batches, threads=READERS, ahead=READERS):
        yield from search_batch(backbone, batch, images, options)


def windows(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Take images from a set until there are enough of them, or enough of their pixels in memory."""
    window: list[Item] = []
    held = 0
    for item in items:
        window.append(item)
        held += item.photo.pixels.nbytes if isinstance(item.photo, Photo) else 0
        if len(window) == WINDOW or held > HELD_BYTES:
            yield window
            window, held = [], 0
    if window:
        yield window


def batches_of(window: list[Item], patch_size: int, most: Callable[[tuple[int, int]], int]) -> Iterator[list[Item]]:
    """Bring images of one padded size together; the order within a size stays."""
    in_order = sorted(window, key=lambda item: padded_size(item, patch_size))
    for size, group in groupby(in_order, key=lambda item: padded_size(item, patch_size)):
        alike, step = list(group), most(size)
        yield from (alike[start : start + step] for start in range(0, len(alike), step))


def batch_size(backbone: Backbone, options: LostOptions) -> Callable[[tuple[int, int]], int]:
    """How many images of a padded size share a forward pass."""
    if backbone.device.type != "cpu":
        return lambda _: options.batch_size
    area = TOKENS_ON_CPU * backbone.patch_size**2
    return lambda size: max(1, min(options.batch_size, area // (size[0] * size[1])))


def padded_size(item: Item, patch_size: int) -> tuple[int, int]:
    """Height and width of an image in whole patches.

    Raises:
        InputError: it is smaller than a patch.
    """
    height, width = item.photo.size
    if min(height, width) < patch_size:
        raise InputError(
            f"{item.photo.name}: {height}x{width} pixels are less than one patch of {patch_size}; remove it"
        )
    return height + -height % patch_size, width + -width % patch_size


def padded_pixels(backbone: Backbone, item: Item) -> Float[Tensor, "3 height width"]:
    """Read, normalise and pad one image."""
    images = backbone.preprocess.normalize(item.photo.pixels)
    return pad_to_patches(images[None], backbone.patch_size)[0]


def pad_to_patches(images: Float[Tensor, "b 3 height width"], patch_size: int) -> Float[Tensor, "b 3 h w"]:
    """Zero-pad normalised images on the bottom and the right up to whole patches, as LOST does."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % patch_size, 0, -height % patch_size))


def search_batch(
    backbone: Backbone, batch: list[Item], images: Float[Tensor, "b 3 height width"], options: LostOptions
) -> Iterator[Finds]:
    """Search images of one padded size, with one forward pass."""
    images = images.to(backbone.device)
    grid = images.shape[-2] // backbone.patch_size, images.shape[-1] // backbone.patch_size
    if method_of(options).needs == "attention":
        with use_precision(options.precision, backbone.device):
            attention = class_attention(backbone, images, options.layer)
        views = [view_of(backbone, item, grid, attention=heads) for item, heads in zip(batch, attention, strict=True)]
        yield from each(batch, views, options)
        return
    places = list(dict.fromkeys(Place(setting.layer, setting.features) for setting in settings_of(options)))
    with use_precision(options.precision, backbone.device):
        reads = read_places(backbone, images, places, norms=options.outliers == "smooth")
    features = {place: patch_features(read, grid) for place, read in zip(places, reads, strict=True)}
    for values in features.values():
        check_images(batch, values)
    if options.method == "lost":
        yield from lost_all(backbone, batch, grid, features, options)
    else:
        views = [
            view_of(backbone, item, grid, features=own) for item, own in zip(batch, features[places[0]], strict=True)
        ]
        yield from each(batch, views, options)


def each(batch: list[Item], views: list[View], options: LostOptions) -> Iterator[Finds]:
    """Search image by image with a method that has one setting."""
    method = method_of(options)
    for item, view in zip(batch, views, strict=True):
        try:
            yield Finds(item, [method.find(view, **own_settings(method, options))])
        except InputError as error:
            raise InputError(f"{item.photo.name}: {error}") from None


def lost_all(
    backbone: Backbone,
    batch: list[Item],
    grid: tuple[int, int],
    features: dict[Place, Float[Tensor, "b p d"]],
    options: LostOptions,
) -> Iterator[Finds]:
    """LOST with every setting: all at once on a GPU, image by image on a CPU, or where biases depend on the image."""
    apart = backbone.device.type == "cpu" or relative(options)
    step = 1 if apart else max(1, TOKENS_AT_ONCE // (grid[0] * grid[1]))
    settings = settings_of(options)
    for start in range(0, len(batch), step):
        part = batch[start : start + step]
        found: dict[Setting, list[LostDiscovery]] = {}
        for place, values in features.items():
            own = [setting for setting in settings if (setting.layer, setting.features) == place]
            unit = unit_of_bias(values[start : start + step], options)
            by_image = discover_all(
                values[start : start + step],
                grid,
                backbone.patch_size,
                [item.photo.size for item in part],
                k_patches=options.k_patches,
                center=options.center,
                normalize=options.normalize,
                biases=[setting.bias * unit for setting in own],
            )
            found |= {setting: [one[index] for one in by_image] for index, setting in enumerate(own)}
        for row, item in enumerate(part):
            yield Finds(item, [found[setting][row] for setting in settings])


def check_images(batch: list[Item], features: Float[Tensor, "b p d"]) -> None:
    """Refuse features that are not finite, and name the first image.

    Raises:
        InputError: there are some.
    """
    finite = features.sum(dim=(1, 2)).isfinite()
    if not finite.all():
        first = int((~finite).nonzero()[0])
        try:
            check_finite(features[first])
        except InputError as error:
            raise InputError(f"{batch[first].photo.name}: {error}") from None


def patch_features(read: Read, grid: tuple[int, int]) -> Float[Tensor, "b p d"]:
    """Features of a batch in float32, without outliers where their norms are there."""
    if read.norms is None:
        return read.features.float()
    pairs = zip(read.features.float(), read.norms, strict=True)
    return torch.stack([smooth_outliers(own, norms, grid) for own, norms in pairs])


def relative(options: LostOptions) -> bool:
    """Whether biases are multiplied by a number of the image."""
    return (options.relative_bias or options.sweep) and not options.normalize


def unit_of_bias(features: Float[Tensor, "b p d"], options: LostOptions) -> float:
    """What biases are multiplied by: the mean squared length of the patches where they are relative, else 1."""
    if not relative(options):
        return 1.0
    return float(prepare(features, center=options.center, normalize=False).square().sum(dim=2).mean())


def method_of(options: LostOptions) -> Method:
    """The method that the options name."""
    return METHODS[options.method.replace("-", "_")]


def own_settings(method: Method, options: LostOptions) -> dict[str, object]:
    """Those options that a method takes."""
    return {name: getattr(options, name) for name in method.settings if hasattr(options, name)}


def view_of(
    backbone: Backbone,
    item: Item,
    grid: tuple[int, int],
    *,
    features: Float[Tensor, "p d"] | None = None,
    attention: Float[Tensor, "heads p"] | None = None,
) -> View:
    """One image as a method sees it."""
    return View(
        grid=grid,
        patch_size=backbone.patch_size,
        image_size=item.photo.size,
        name=item.photo.name,
        features=features,
        attention=attention,
    )


def bare_view(backbone: Backbone, item: Item) -> View:
    """An image of which nothing but the size is known."""
    height, width = padded_size(item, backbone.patch_size)
    return view_of(backbone, item, (height // backbone.patch_size, width // backbone.patch_size))


@torch.no_grad()
def class_attention(
    backbone: Backbone, images: Float[Tensor, "b 3 height width"], layer: int
) -> Float[Tensor, "b heads p"]:
    """Attention of the class token to the patches.

    Raises:
        InputError: a model without a class token.
    """
    if "cls" not in backbone.prefix:
        raise InputError("--method dino-seg needs the class token's attention, and this model has none; give another")
    return backbone.attention(images, layer)[:, :, 0, backbone.num_prefix_tokens :].float()


def photo_items(photos: Iterable[Photo | PhotoFile], skip: Sequence[int] | set[int] = ()) -> Iterator[Item]:
    """Number the images of a set; some are left out."""
    return (Item(index, photo) for index, photo in enumerate(photos) if index not in skip)
