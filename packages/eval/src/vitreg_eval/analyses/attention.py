"""Attention maps of class token and registers (registers paper, figures 1, 2, 8, 9 and 14)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from vitreg_eval.analyses.panels import bare, panels, show_image

TOP = 0.02
"""Part of the patches whose mass is measured: as many as DINOv2 g has outliers."""
BY_CLASS = "class token"
BY_PATCHES = "mean over patches as queries (no class token)"


@dataclass(frozen=True)
class Looks:
    """Where a model looks in each image, and how peaky that is."""

    maps: Float[Tensor, "b rows cols"]
    """Attention paid to each patch; every map sums to 1."""
    query: str
    """Which token looks: the class token, or the mean of all patches in a model without one."""

    @property
    def peakiness(self) -> Float[Tensor, " b"]:
        """Largest over median value of each map, 1 or more."""
        return peakiness(self.maps)

    @property
    def top_share(self) -> Float[Tensor, " b"]:
        """Part of each map's mass in its top 2 % of patches, 0 to 1."""
        return top_share(self.maps)


class Picked(NamedTuple):
    """Images chosen by rule: indices."""

    best: int
    """Least peaky map."""
    median: int
    worst: int
    """Peakiest map."""


def looks(
    attention: Float[Tensor, "b h n n"], prefix: Sequence[Literal["cls", "register"]], grid: tuple[int, int]
) -> Looks:
    """Where the image as a whole looks, mean over heads: the class token, or without one the mean of all patches."""
    if "cls" in prefix:
        return Looks(prefix_maps(attention, len(prefix), grid)[:, 0], BY_CLASS)
    return Looks(patch_query_map(attention, len(prefix), grid), BY_PATCHES)


def prefix_maps(
    attention: Float[Tensor, "b h n n"], prefix: int, grid: tuple[int, int]
) -> Float[Tensor, "b prefix rows cols"]:
    """Where class token and registers look: mean over heads, patches only, each map summing to 1."""
    return on_grid(attention.mean(dim=1)[:, :prefix, prefix:], grid)


def patch_query_map(
    attention: Float[Tensor, "b h n n"], prefix: int, grid: tuple[int, int]
) -> Float[Tensor, "b rows cols"]:
    """Where patches look on average, mean over heads and queries: for models without a class token; sums to 1."""
    return on_grid(attention.mean(dim=1)[:, prefix:, prefix:].mean(dim=1), grid)


def on_grid(weights: Float[Tensor, "*b p"], grid: tuple[int, int]) -> Float[Tensor, "*b rows cols"]:
    """Weights of patches as maps that sum to 1; a map without any mass stays 0."""
    maps = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return rearrange(maps, "... (rows cols) -> ... rows cols", rows=grid[0], cols=grid[1])


def peakiness(maps: Float[Tensor, "*b rows cols"]) -> Float[Tensor, "*b"]:
    """Largest over median value of each map: 1 for an even map, large for one with isolated peaks."""
    flat = maps.flatten(-2)
    return flat.max(dim=-1).values / flat.median(dim=-1).values


def top_share(maps: Float[Tensor, "*b rows cols"], share: float = TOP) -> Float[Tensor, "*b"]:
    """Part of each map's mass in its top patches, 0 to 1; `share` of the patches, rounded up."""
    flat = maps.flatten(-2)
    count = max(1, math.ceil(round(share * flat.shape[-1], 9)))  # 0.07 * 100 is a little more than 7
    return flat.topk(count, dim=-1).values.sum(dim=-1) / flat.sum(dim=-1)


def pick_images(scores: Float[Tensor, " b"]) -> Picked:
    """Images with the lowest, the median and the highest peakiness; of equal ones the first. A rule, not a choice."""
    order = scores.argsort(stable=True).tolist()
    return Picked(order[0], order[(len(order) - 1) // 2], int(scores.argmax()))


def plot_attention(images: Sequence[np.ndarray], maps: Mapping[str, Float[Tensor, "b rows cols"]]) -> Figure:
    """One row per image, with one column for each named map: of several models, heads or tokens.

    All maps of a row share one colour range, from 0 to the largest value of the row; each says how peaky it is.

    Args:
        images: pixels in 0 to 1.
        maps: what stands above a column, and its map of every image; patch grids may differ between columns.
    """
    figure, grid = panels(len(images), 1 + len(maps), width=1.7, height=1.8)
    for row, (axes, image) in enumerate(zip(grid, images, strict=True)):
        show_image(axes[0], image, "image" if row == 0 else "")
        high = max(float(column[row].max()) for column in maps.values())
        for one, (name, column) in zip(axes[1:], maps.items(), strict=True):
            one.imshow(column[row].float().numpy(), vmin=0, vmax=high, interpolation="nearest")
            bare(one, fill(name, 24) if row == 0 else "")
            one.set_xlabel(f"max/median {float(peakiness(column[row])):,.1f}", fontsize=7)
    return figure
