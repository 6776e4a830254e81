"""Classes of every pixel of a picture of any size, from a head that reads crops of one size."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.features import Backbone
from vitreg_core.precision import Precision

from vitreg_eval.dense import feature_maps
from vitreg_eval.segment_head import SegmentHead

ROOM = 2**25
"""Logits held at once at the size of a picture: 128 MiB."""


@dataclass(frozen=True)
class Segmenter:
    """A frozen backbone, a trained head, and how they are run over pictures."""

    backbone: Backbone
    head: SegmentHead
    layers: tuple[int, ...]
    """Blocks that the head reads."""
    crop: int
    """Side of a window in pixels."""
    precision: Precision
    batch_size: int
    """Windows per forward pass."""

    @torch.no_grad()
    def __call__(
        self, image: Float[Tensor, "3 height width"], size: tuple[int, int]
    ) -> UInt8[Tensor, "label_height label_width"]:
        """Classes at the size of the label; the image is normalised and has no side below the crop."""
        places = list(windows(image.shape[-2:], self.crop))
        views = torch.stack([image[(slice(None), *place)] for place in places])
        logits = torch.zeros(self.head.conv.out_channels, *image.shape[-2:], device=self.backbone.device)
        hits = torch.zeros(image.shape[-2:], device=self.backbone.device)
        found = (self.read(part) for part in views.split(self.batch_size))
        for place, window in zip(places, (window for part in found for window in part), strict=True):
            logits[(slice(None), *place)] += window
            hits[place] += 1
        return enlarged_argmax(logits / hits, size).cpu()

    def read(self, images: Float[Tensor, "b 3 crop crop"]) -> Float[Tensor, "b classes crop crop"]:
        """Logits of every pixel of a few windows."""
        maps = feature_maps(self.backbone, images, self.layers, self.precision)
        return F.interpolate(self.head(maps), size=tuple(images.shape[-2:]), mode="bilinear")


def windows(size: tuple[int, ...], crop: int) -> Iterator[tuple[slice, slice]]:
    """Places of the windows that cover an image, row by row."""
    rows, cols = (starts(side, crop) for side in size)
    for top in rows:
        for left in cols:
            yield slice(top, top + crop), slice(left, left + crop)


def starts(side: int, crop: int) -> list[int]:
    """Where the windows along a side begin: two thirds of a crop apart, the last at the border."""
    stride = crop * 2 // 3
    count = max(-(-(side - crop) // stride), 0) + 1
    return [max(min(index * stride, side - crop), 0) for index in range(count)]


def enlarged_argmax(
    logits: Float[Tensor, "classes height width"], size: tuple[int, int]
) -> UInt8[Tensor, "label_height label_width"]:
    """The class of the largest logit, after they were brought to another size, a few classes at a time."""
    at_once = max(1, ROOM // (size[0] * size[1]))
    best = torch.full(size, -torch.inf, device=logits.device)
    found = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    for first in range(0, len(logits), at_once):
        part = F.interpolate(logits[None, first : first + at_once], size=size, mode="bilinear")[0]
        values, classes = part.max(dim=0)
        better = values > best
        best[better] = values[better]
        found[better] = (classes[better] + first).to(torch.uint8)
    return found
