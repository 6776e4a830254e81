"""Queries, keys or values of the patches in any blocks, from one pass that stops at the last block that is wanted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.backbones.adapter import Adapter
from vitreg_core.features import Backbone
from vitreg_core.outliers import find_outliers
from vitreg_core.vit import VisionTransformer

from vitreg_eval.config.lost import Facet

THIRDS: tuple[Facet, ...] = ("queries", "keys", "values")
"""In the order of a packed projection."""


class Place(NamedTuple):
    """Where features are read: the output of one block's qkv projection, before any norm, rotation or scale."""

    layer: int
    facet: Facet


@dataclass(frozen=True)
class Read:
    """What was read in one place, of a batch of images."""

    features: Float[Tensor, "b p d"]
    """Of the patches alone, heads side by side."""
    norms: Float[Tensor, "b p"] | None
    """Lengths of the patches in the residual stream that the block reads; None where nobody asked."""


@torch.no_grad()
def read_places(
    backbone: Backbone, images: Float[Tensor, "b 3 height width"], places: Sequence[Place], *, norms: bool = False
) -> list[Read]:
    """Features of patches in several places, in the order asked.

    Our own model runs the blocks before the last one wanted, then one norm and the third of the projection that is
    wanted; models of other libraries stop at that projection, too. Anything else answers place by place.

    Raises:
        InputError: a block or a facet that the model does not have.
    """
    if type(backbone) is VisionTransformer:  # what derives from it may answer for itself
        return read_native(backbone, images, places, norms=norms)
    skipped = backbone.num_prefix_tokens
    if isinstance(backbone, Adapter):
        parts = {*(place.facet for place in places), *(("before",) if norms else ())}
        seen = backbone.look(images, list({place.layer for place in places}), *parts)
        heads = [getattr(seen, place.facet)[place.layer] for place in places]
        before = [seen.before[place.layer] if norms else None for place in places]
    else:
        heads = [getattr(backbone.qkv(images, place.layer), place.facet) for place in places]
        before = [block_input(backbone, images, place.layer) if norms else None for place in places]
    features = [rearrange(one[:, :, skipped:], "b h p k -> b p (h k)") for one in heads]
    lengths = [None if one is None else patch_lengths(one, skipped) for one in before]
    return [Read(*pair) for pair in zip(features, lengths, strict=True)]


def read_native(
    model: VisionTransformer,
    images: Float[Tensor, "b 3 height width"],
    places: Sequence[Place],
    *,
    norms: bool = False,
) -> list[Read]:
    """As `read_places`, without a computation that is not needed."""
    wanted = [model.layer_index(place.layer) for place in places]
    tokens, rotation = model.embed(images), model.rotation(images)
    skipped = model.num_prefix_tokens
    found: dict[int, Read] = {}
    for layer in range(max(wanted) + 1):
        block = model.block(layer)
        if layer in wanted:
            patches = block.norm1(tokens[:, skipped:])
            lengths = patch_lengths(tokens, skipped) if norms else None
            for index, place in enumerate(places):
                if wanted[index] == layer:
                    third = THIRDS.index(place.facet)
                    weight = block.attn.qkv.weight.chunk(3)[third]
                    bias = None if block.attn.qkv.bias is None else block.attn.qkv.bias.chunk(3)[third]
                    found[index] = Read(F.linear(patches, weight, bias), lengths)
        if layer < max(wanted):
            tokens = model.run(block, tokens, rotation)
    return [found[index] for index in range(len(places))]


def block_input(backbone: Backbone, images: Float[Tensor, "b 3 height width"], layer: int) -> Float[Tensor, "b n d"]:
    """The residual stream that a block reads; the first block reads no stream of another, so its output stands in."""
    before = (layer % backbone.depth) - 1
    return backbone.intermediate(images, [max(before, 0)], norm=False)[0].tokens


def patch_lengths(tokens: Float[Tensor, "b n d"], skipped: int) -> Float[Tensor, "b p"]:
    """L2 norms of the patches."""
    return torch.linalg.vector_norm(tokens[:, skipped:].float(), dim=-1)


def smooth_outliers(
    features: Float[Tensor, "p d"], norms: Float[Tensor, " p"], grid: tuple[int, int]
) -> Float[Tensor, "p d"]:
    """Give outlier patches the mean features of their neighbours, corners included, that are none.

    Outliers are those of `find_outliers` in this image alone. Where all neighbours are outliers, the ring that was
    filled before them counts, from the outside in.
    """
    outliers = find_outliers(norms[None].cpu()).mask[0].to(features.device)
    return fill(features, outliers, grid) if outliers.any() and not outliers.all() else features


def fill(features: Float[Tensor, "p d"], holes: Bool[Tensor, " p"], grid: tuple[int, int]) -> Float[Tensor, "p d"]:
    """Replace the features of some patches by the mean of their neighbours, ring by ring."""
    rows, cols = grid
    known = rearrange(~holes, "(r c) -> 1 1 r c", r=rows, c=cols).to(features.dtype)
    values = rearrange(features, "(r c) d -> 1 d r c", r=rows, c=cols) * known
    while not known.all():
        around = 9 * F.avg_pool2d(known, 3, stride=1, padding=1)
        means = 9 * F.avg_pool2d(values, 3, stride=1, padding=1) / around.clamp(min=1)
        fresh = (known == 0) & (around > 0.5)
        values = torch.where(fresh, means, values)
        known = torch.where(fresh, torch.ones_like(known), known)
    filled = rearrange(values, "1 d r c -> (r c) d")
    return torch.where(holes[:, None], filled, features)
