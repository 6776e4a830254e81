"""What a segmentation head is trained on: features of one crop of every image, or of new crops at every step."""

from collections.abc import Callable, Iterator

import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.features import Backbone

from vitreg_eval.config import SegmentOptions
from vitreg_eval.datasets import Batch, ImageSet, grouped, prepared
from vitreg_eval.datasets.examples import Pairs
from vitreg_eval.dense import Draw, draws, feature_maps, mix, prefetched
from vitreg_eval.extract import extract
from vitreg_eval.segment_head import HeadRecord
from vitreg_eval.segment_views import fixed_view, train_view
from vitreg_eval.tokens import Wanted

FINER = 4
"""Cached masks have so many values along the side of a patch: a fraction of the work, and of the memory."""

Batches = Callable[[int], tuple[Tensor, Tensor]]


def cached_batches(
    backbone: Backbone,
    pairs: Pairs,
    record: HeadRecord,
    options: SegmentOptions,
    steps: int,  # noqa: ARG001 (as the other protocol)
) -> Batches:
    """Features of one crop of every image, computed once or read from the cache, and its mask."""
    crops = fixed_crops(backbone, pairs, record, options)
    found = extract(backbone, crops, options, Wanted(layers=record.layers, parts=("patches",)))

    def batch(step: int) -> tuple[Tensor, Tensor]:
        places = draws(len(pairs), options.batch_size, options.seed, step)
        chosen = torch.tensor([draw.index for draw in places])
        patches = found.parts["patches"][chosen].to(backbone.device).float()
        maps = rearrange(patches, "b layers (rows cols) d -> b (layers d) rows cols", rows=found.grid[0])
        return maps, found.targets["mask"][chosen].to(backbone.device)

    return batch


def fixed_crops(backbone: Backbone, pairs: Pairs, record: HeadRecord, options: SegmentOptions) -> ImageSet:
    """One crop of every image, the same for the same seed; target: mask, four values along the side of a patch."""
    assert record.crop is not None
    crop, side = record.crop, record.crop // backbone.patch_size * FINER

    def prepare(index: int) -> tuple[Tensor, Tensor]:
        image, mask = fixed_view(*pairs.read(index), backbone.preprocess, crop, mix(options.seed, 3, index))
        return image, sampled(mask, side)

    def part(start: int, stop: int) -> Iterator[Batch]:
        for read in grouped(prepare, start, stop, options.batch_size):
            images, masks = zip(*read, strict=True)
            yield Batch(torch.stack(images), {"mask": torch.stack(masks)})

    known = {**prepared(backbone.preprocess), "segment_crop": crop, "mask": side, "seed": options.seed}
    return ImageSet(pairs.data, part, known)


def sampled(mask: UInt8[Tensor, "height width"], side: int) -> UInt8[Tensor, "side side"]:
    """The nearest classes on a coarser grid."""
    return F.interpolate(mask[None, None], size=(side, side), mode="nearest-exact")[0, 0]


def dinov2_batches(
    backbone: Backbone, pairs: Pairs, record: HeadRecord, options: SegmentOptions, steps: int
) -> Batches:
    """New crops at every step, and what the backbone gives of them."""
    assert record.crop is not None
    crop = record.crop

    def prepare(draw: Draw) -> tuple[Tensor, Tensor]:
        return train_view(*pairs.read(draw.index), backbone.preprocess, crop, draw.seed)

    read = prefetched(prepare, len(pairs), options.batch_size, seed=options.seed, steps=steps)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        images, masks = zip(*read(step), strict=True)
        maps = feature_maps(backbone, torch.stack(images), record.layers, options.precision)
        return maps, torch.stack(masks).to(backbone.device)

    return batch
