"""Denoised features: patch tokens averaged over shifted views of an image (Chen et al. 2025, arXiv 2505.21501).

Artifacts stay where they are while the picture moves, so they average out where the picture is put back in place.
Views move by whole patches: every patch then holds the very pixels that it held before, and its token is put back
exactly, without resampling feature maps. Smaller shifts would leave artifacts on the same patches: in the ViT-Ti whose
outliers sit in the corners, 94 % of them stay on their patch when the picture moves by a quarter or half of one, and
none when it moves by one or two.
"""

from collections.abc import Callable, Sequence
from itertools import cycle, islice, product
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_core.errors import InputError
from vitreg_core.features import QKV, Backbone, Features

SHIFTS = 10
"""Views of an image, as in the paper."""
SHARE = 0.15
"""Largest shift over the side of the image, as in the paper."""
Read = Callable[[Float[Tensor, "b 3 height width"]], list[Float[Tensor, "b p _"]]]
"""From images to what is averaged: any number of tensors with a row per patch."""


class View(NamedTuple):
    """How a picture is moved: first shifted, then mirrored."""

    down: int
    """Patches that it moves down; negative ones up."""
    right: int
    """Patches that it moves to the right; negative ones to the left."""
    mirrored: bool
    """Whether left and right are exchanged."""


class Averaged(NamedTuple):
    """What several views saw of every patch."""

    patches: list[Float[Tensor, "b p _"]]
    """Means over the views that saw a patch; 0 where none did."""
    seen: Int[Tensor, " p"]
    """How many views saw each patch."""


def draw_views(
    grid: tuple[int, int],
    count: int = SHIFTS,
    *,
    share: float = SHARE,
    flips: bool = True,
    seed: int | tuple[int, ...] = 0,
) -> list[View]:
    """Draw random views, none of which leaves the picture in place.

    Shifts go round the four diagonal directions, so that from four views on every patch is seen: a patch in a corner is
    seen by those alone that move it inward. A shift is drawn again only where its direction has no other left.

    Args:
        grid: rows and columns of patches.
        count: views, at least 1.
        share: largest shift over the side, 0 to 1; at least one patch, where there are two.
        flips: whether each view is mirrored with probability 1/2.
        seed: fixes all of them.

    Raises:
        InputError: no view, a share that is none, or a grid of one patch.
    """
    if count < 1:
        raise InputError(f"shifts={count}: give at least 1")
    if not 0 < share < 1:
        raise InputError(f"share={share} of the side; give a number between 0 and 1, such as {SHARE}")
    rows, cols = (min(side - 1, max(1, round(share * side))) for side in grid)
    if not rows and not cols:
        raise InputError(f"images of {grid[0]}x{grid[1]} patches cannot be shifted; give larger ones")
    shifts = [pair for pair in product(range(-rows, rows + 1), range(-cols, cols + 1)) if pair != (0, 0)]
    numbers = np.random.default_rng(seed)
    views: list[View] = []
    left: list[tuple[int, int]] = []
    for down, right in islice(cycle(numbers.permutation(list(product((1, -1), repeat=2))).tolist()), count):
        fitting = [pair for pair in left if pair[0] * down >= 0 and pair[1] * right >= 0]
        if not fitting:
            left = list(shifts)
            fitting = [pair for pair in left if pair[0] * down >= 0 and pair[1] * right >= 0]
        left.remove(chosen := fitting[int(numbers.integers(len(fitting)))])
        views.append(View(*chosen, mirrored=flips and bool(numbers.integers(2))))
    return views


def move(images: Float[Tensor, "b 3 height width"], view: View, patch_size: int) -> Float[Tensor, "b 3 height width"]:
    """Shift and mirror images; the picture's own mirror image fills what becomes free."""
    height, width = images.shape[-2:]
    down, right = view.down * patch_size, view.right * patch_size
    sides = (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0))
    wide = F.pad(images, sides, mode="reflect")
    shifted = wide[..., max(-down, 0) :, max(-right, 0) :][..., :height, :width]
    return shifted.flip(-1) if view.mirrored else shifted


def shift_average(
    read: Read, images: Float[Tensor, "b 3 height width"], views: Sequence[View], patch_size: int
) -> Averaged:
    """Average what a model says of every patch over views, each put back in place.

    A patch that leaves the frame of a view does not count in it. Sums are taken in float32 at least.

    Args:
        read: what to average, such as `lambda images: [model.features(images).patches]`.
        images: normalised pixels, with no pixels beyond the last whole patch.
        views: from `draw_views`; the model runs once for each.
        patch_size: side of a patch in pixels.
    """
    rows, cols = (side // patch_size for side in images.shape[-2:])
    seen = torch.zeros(rows, cols, dtype=torch.int64, device=images.device)
    sums: list[Tensor] = []
    for view in views:
        maps = [
            rearrange(part, "b (rows cols) d -> b rows cols d", rows=rows)
            for part in read(move(images, view, patch_size))
        ]
        sums = sums or [torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32)) for part in maps]
        top, bottom = max(-view.down, 0), rows - max(view.down, 0)
        left, right = max(-view.right, 0), cols - max(view.right, 0)
        for total, part in zip(sums, maps, strict=True):
            upright = part.flip(2) if view.mirrored else part
            there = upright[:, top + view.down : bottom + view.down, left + view.right : right + view.right]
            total[:, top:bottom, left:right] += there
        seen[top:bottom, left:right] += 1
    means = [(total / seen.clamp(min=1)[:, :, None]).to(part.dtype) for total, part in zip(sums, maps, strict=True)]
    return Averaged([rearrange(mean, "b rows cols d -> b (rows cols) d") for mean in means], seen.flatten())


def averaged_features(
    model: Backbone, images: Float[Tensor, "b 3 height width"], views: Sequence[View]
) -> tuple[Float[Tensor, "b p d"], Int[Tensor, " p"]]:
    """Patch tokens of one batch after the final norm, averaged over views, and how many of them saw each patch.

    Args:
        model: any model, in evaluation mode.
        images: normalised pixels; those beyond the last whole patch are dropped.
        views: from `draw_views`.
    """
    images = whole_patches(images, model.patch_size)
    found = shift_average(lambda moved: [model.features(moved).patches], images, views, model.patch_size)
    return found.patches[0], found.seen


def whole_patches(images: Float[Tensor, "b 3 height width"], patch_size: int) -> Float[Tensor, "b 3 _ _"]:
    """Images without the pixels beyond the last whole patch.

    Raises:
        InputError: they are smaller than one patch.
    """
    height, width = images.shape[-2:]
    if min(height, width) < patch_size:
        raise InputError(
            f"image of {height}x{width} pixels is smaller than one patch of {patch_size}; give larger images"
        )
    return images[..., : height // patch_size * patch_size, : width // patch_size * patch_size]


class Denoised(nn.Module):
    """A model whose patch tokens, queries, keys and values are averaged over views. It is a `Backbone`.

    Class token and registers are those of the image itself, and so is a patch that no view saw. Attention, hidden units
    and embeddings belong to one pass and are the model's own, unchanged. It shares all weights.
    """

    def __init__(self, model: Backbone, shifts: int, *, share: float, flips: bool, seed: int) -> None:
        super().__init__()
        assert isinstance(model, nn.Module)
        self.model = model
        self.shifts, self.share, self.flips, self.seed = shifts, share, flips, seed
        self.patch_size, self.embed_dim, self.depth = model.patch_size, model.embed_dim, model.depth
        self.num_heads, self.num_registers = model.num_heads, model.num_registers
        self.prefix, self.num_prefix_tokens = model.prefix, model.num_prefix_tokens
        self.preprocess = model.preprocess
        self.source = f"{getattr(model, 'source', '')}, averaged over {shifts} shifts".removeprefix(", ")

    def extra_repr(self) -> str:
        """What changes the features, for those who ask whether two models are the same."""
        return f"shifts={self.shifts}, share={self.share}, flips={self.flips}, seed={self.seed}"

    @property
    def backbone(self) -> Backbone:
        """The model by what it can do."""
        assert isinstance(self.model, Backbone)
        return self.model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.device

    def views(self, images: Float[Tensor, "b 3 height width"]) -> list[View]:
        """The views of images of this size, the same in every call."""
        height, width = images.shape[-2:]
        grid = (height // self.patch_size, width // self.patch_size)
        return draw_views(grid, self.shifts, share=self.share, flips=self.flips, seed=self.seed)

    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Features:
        """Tokens after the final norm, patches averaged."""
        return self.features(images)

    def features(self, images: Float[Tensor, "b 3 height width"]) -> Features:
        """Tokens after the final norm, patches averaged."""
        return self.averaged(lambda moved: [self.backbone.features(moved)], images)[0]

    def intermediate(
        self, images: Float[Tensor, "b 3 height width"], layers: Sequence[int], *, norm: bool = True
    ) -> list[Features]:
        """Tokens after each named block, patches averaged; with `norm` after the final norm, else before it.

        Raises:
            InputError: a block that the model does not have.
        """
        return self.averaged(lambda moved: self.backbone.intermediate(moved, layers, norm=norm), images)

    def qkv(self, images: Float[Tensor, "b 3 height width"], layer: int) -> QKV:
        """Queries, keys and values of a block, those of the patches averaged."""
        skipped = self.num_prefix_tokens

        def read(moved: Float[Tensor, "b 3 height width"]) -> list[Tensor]:
            found = self.backbone.qkv(moved, layer)
            parts = (found.queries, found.keys, found.values)
            return [rearrange(part, "b h n k -> b n (h k)", h=self.num_heads) for part in parts]

        images = whole_patches(images, self.patch_size)
        plain = read(images)
        patches = self.denoised(
            lambda moved: [part[:, skipped:] for part in read(moved)], images, [part[:, skipped:] for part in plain]
        )
        joined = (torch.cat([one[:, :skipped], mean], dim=1) for one, mean in zip(plain, patches, strict=True))
        return QKV(*(rearrange(part, "b n (h k) -> b h n k", h=self.num_heads) for part in joined))

    def attention(self, images: Float[Tensor, "b 3 height width"], layer: int) -> Float[Tensor, "b h n n"]:
        """Attention weights of the model itself."""
        return self.backbone.attention(images, layer)

    def hidden(self, images: Float[Tensor, "b 3 height width"], layer: int) -> Float[Tensor, "b n hidden"]:
        """Hidden units of the model itself."""
        return self.backbone.hidden(images, layer)

    def embeddings(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b p d"]:
        """Patch embeddings of the model itself."""
        return self.backbone.embeddings(images)

    def averaged(
        self,
        run: Callable[[Float[Tensor, "b 3 height width"]], list[Features]],
        images: Float[Tensor, "b 3 height width"],
    ) -> list[Features]:
        """Features of the image itself with averaged patches."""
        images = whole_patches(images, self.patch_size)
        plain = run(images)
        patches = self.denoised(lambda moved: [part.patches for part in run(moved)], images, [p.patches for p in plain])
        return [Features(one.cls, one.registers, mean, one.grid) for one, mean in zip(plain, patches, strict=True)]

    def denoised(
        self, read: Read, images: Float[Tensor, "b 3 height width"], plain: list[Float[Tensor, "b p _"]]
    ) -> list[Float[Tensor, "b p _"]]:
        """Means over the views; a patch that none saw as it is in the image itself."""
        found = shift_average(read, images, self.views(images), self.patch_size)
        there = (found.seen > 0)[:, None]
        return [torch.where(there, mean, one) for mean, one in zip(found.patches, plain, strict=True)]


def denoise(
    model: Backbone, shifts: int = SHIFTS, *, share: float = SHARE, flips: bool = True, seed: int = 0
) -> Denoised:
    """A model whose patch tokens are averaged over shifted and mirrored views, without training.

    It takes `shifts` + 1 passes where the model takes one. The views are the same for all images of a size.

    Args:
        model: any model; its weights are shared, not copied.
        shifts: views to average over.
        share: largest shift over the side of the image, between 0 and 1.
        flips: whether views are mirrored at random.
        seed: fixes the views.

    Raises:
        InputError: no view, a share that is none, or (when it runs) images of one patch.
    """
    draw_views((2, 2), shifts, share=share)  # which checks both
    return Denoised(model, shifts, share=share, flips=flips, seed=seed)
