"""From pictures to depth: what a model reads, what its depth head reads, and the answer at the size of the picture."""

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.data.images import FILTERS, to_tensor
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone
from vitreg_core.precision import Precision, use_precision

from vitreg_eval.config import DepthOptions
from vitreg_eval.dense import pad_to_multiple
from vitreg_eval.depth_head import HeadRecord, TrainedHead, join_maps, resize_depth


@torch.no_grad()
def depth_features(
    backbone: Backbone, images: Float[Tensor, "b 3 height width"], record: HeadRecord, precision: Precision
) -> Float[Tensor, "b channels rows cols"]:
    """What a depth head reads of normalised images, which are padded to whole patches; float32.

    Raises:
        InputError: a model without class token.
    """
    with use_precision(precision, backbone.device):
        images = pad_to_multiple(images.to(backbone.device), backbone.patch_size)
        found = backbone.intermediate(images, record.layers, norm=record.norm)
    patches = torch.stack([features.patch_map.float() for features in found], dim=1)
    cls = torch.stack([class_token(features.cls) for features in found], dim=1)
    return join_maps(patches, cls.float())


def class_token(cls: Float[Tensor, "*b d"] | None) -> Float[Tensor, "*b d"]:
    """The class token of features."""
    if cls is None:
        raise InputError("this model has no class token, which the depth head reads; give a model that has one")
    return cls


@torch.no_grad()
def predict_depth(
    backbone: Backbone, trained: TrainedHead, image: Image.Image, options: DepthOptions
) -> Float[Tensor, "height width"]:
    """Depth of one picture in metres, at its size, on the CPU."""
    size = None if options.protocol == "dinov2" else fitted_size(backbone, (image.height, image.width), options)
    pixels = model_input(backbone, image, size)[None]
    if options.flip:
        pixels = torch.cat([pixels, pixels.flip(-1)])
    depth = trained.head(depth_features(backbone, pixels, trained.record, options.precision))
    depth = unpadded(depth, pixels.shape[-2:], backbone.patch_size, released=trained.record.released)
    depth = resize_depth(depth, (image.height, image.width))
    if options.flip:
        depth = (depth[:1] + depth[1:].flip(-1)) / 2
    return depth[0].clamp(trained.record.min_depth, trained.record.max_depth).cpu()


def unpadded(
    depth: Float[Tensor, "b rows cols"], size: torch.Size, patch_size: int, *, released: bool
) -> Float[Tensor, "b height width"]:
    """Depth over the image alone.

    The heads that DINOv2 released were trained and measured with the padded image stretched over the unpadded one, so
    nothing is cut away for them.
    """
    height, width = size
    if released:
        return resize_depth(depth, (height, width))
    rows, cols = -height % patch_size, -width % patch_size
    whole = resize_depth(depth, (height + rows, width + cols))
    return whole[:, rows // 2 : rows // 2 + height, cols // 2 : cols // 2 + width]


def model_input(
    backbone: Backbone, image: Image.Image, size: tuple[int, int] | None
) -> Float[Tensor, "3 height width"]:
    """Normalised pixels of a picture, at its own size or resized to height and width."""
    if size is not None:
        filter_ = FILTERS[backbone.preprocess.config.interpolation]
        image = image.convert("RGB").resize((size[1], size[0]), filter_)
    return backbone.preprocess.normalize(to_tensor(image))


def fitted_size(backbone: Backbone, size: tuple[int, int], options: DepthOptions) -> tuple[int, int]:
    """Height and width in whole patches, nearest to the shorter side asked for and the aspect of the picture."""
    shorter = options.image_size or backbone.preprocess.config.image_size
    if shorter < backbone.patch_size:
        raise InputError(f"--image_size {shorter} is smaller than a patch of {backbone.patch_size} px; give more")
    patches = [max(1, round(side * shorter / min(size) / backbone.patch_size)) for side in size]
    return patches[0] * backbone.patch_size, patches[1] * backbone.patch_size


def nearest_depth(depth: Float[Tensor, "height width"], size: tuple[int, int]) -> Float[Tensor, "rows cols"]:
    """Depth at another size, without mixing readings with gaps."""
    return F.interpolate(depth[None, None], size=size, mode="nearest-exact")[0, 0]
