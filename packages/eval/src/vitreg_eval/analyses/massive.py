"""Massive activations: a few numbers of the residual stream that dwarf all others (Sun et al. 2024, arXiv 2402.17762).

They call an activation massive above 100 in magnitude and a thousand times the median magnitude of its hidden state,
and show that it keeps to few dimensions and few tokens. High-norm tokens are such tokens seen as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.analyses.panels import OUTLIER_COLOUR, panels, plain_log_ticks

TOP = 3
LEAST, TIMES_MEDIAN = 100.0, 1000.0
"""What makes an activation massive: its magnitude, and that over the median one."""
NAMED_DIMENSIONS = 5
KINDS = ("cls", "register", "patch", "outlier")


@dataclass(frozen=True)
class DimensionShare:
    """How often one dimension holds the largest activation."""

    dimension: int
    share: float
    """Part of the images, 0 to 1."""


@dataclass(frozen=True)
class HolderShares:
    """Which kind of token holds the largest activation: parts of the images, which sum to 1."""

    cls: float
    register: float
    patch: float
    """A patch that is no outlier, or any patch where outliers were not given."""
    outlier: float


@dataclass(frozen=True)
class BlockActivations:
    """Magnitudes in the residual stream after one block."""

    block: int
    top: Float[np.ndarray, "3"]
    """Largest three magnitudes of an image, mean over the images."""
    median: float
    """Median magnitude of an image, mean over the images."""
    largest: float
    """Largest magnitude in any image."""
    massive_images: float
    """Part of the images with a massive activation, 0 to 1."""
    dimensions: tuple[DimensionShare, ...]
    """The dimensions that hold the largest activation most often, at most five."""
    holders: HolderShares
    images: int


class MassiveActivations:
    """Takes in the residual stream batch by batch; its memory does not grow with the images."""

    def __init__(self, depth: int, embed_dim: int) -> None:
        self.images = 0
        self.top = torch.zeros(depth, TOP, dtype=torch.float64)
        self.median = torch.zeros(depth, dtype=torch.float64)
        self.largest = torch.zeros(depth, dtype=torch.float64)
        self.massive = torch.zeros(depth, dtype=torch.long)
        self.dimensions = torch.zeros(depth, embed_dim, dtype=torch.long)  # depth d
        self.kinds = torch.zeros(depth, len(KINDS), dtype=torch.long)

    def add(
        self,
        blocks: Sequence[Float[Tensor, "b n d"]],
        prefix: Sequence[Literal["cls", "register"]],
        outliers: Bool[Tensor, "b p"] | None = None,
    ) -> None:
        """Take in a batch.

        Args:
            blocks: all tokens after every block, before the final norm.
            prefix: kinds of the tokens before the patches, in order.
            outliers: which patches are outliers; without it no token counts as one.
        """
        kinds = token_kinds(blocks[0], prefix, outliers)
        for block, tokens in enumerate(blocks):
            self.add_block(block, tokens.abs().float().flatten(1), kinds)
        self.images += len(blocks[0])

    def add_block(self, block: int, magnitudes: Float[Tensor, "b values"], kinds: Tensor) -> None:
        """Take in one block of a batch; the values of an image run over its tokens, dimensions fastest."""
        embed_dim = self.dimensions.shape[1]
        top = magnitudes.topk(TOP, dim=1)
        median = magnitudes.median(dim=1).values
        first, where = top.values[:, 0], top.indices[:, 0]
        massive = (first > LEAST) & (first > TIMES_MEDIAN * median)
        holders = kinds.gather(1, (where // embed_dim)[:, None])[:, 0]
        self.top[block] += top.values.double().sum(dim=0).cpu()
        self.median[block] += float(median.double().sum())
        self.largest[block] = max(float(self.largest[block]), float(first.max()))
        self.massive[block] += int(massive.sum())
        self.dimensions[block] += torch.bincount(where % embed_dim, minlength=embed_dim).cpu()
        self.kinds[block] += torch.bincount(holders, minlength=len(KINDS)).cpu()

    def result(self) -> list[BlockActivations]:
        """What was found after every block.

        Raises:
            InputError: no images yet.
        """
        if not self.images:
            raise InputError("massive activations of 0 images; give at least one")
        return [self.block_result(block) for block in range(len(self.top))]

    def block_result(self, block: int) -> BlockActivations:
        """What was found after one block."""
        counts = self.dimensions[block]
        most = counts.argsort(descending=True, stable=True)[:NAMED_DIMENSIONS].tolist()
        cls, register, patch, outlier = (self.kinds[block].double() / self.images).tolist()
        return BlockActivations(
            block=block,
            top=(self.top[block] / self.images).numpy(),
            median=float(self.median[block]) / self.images,
            largest=float(self.largest[block]),
            massive_images=int(self.massive[block]) / self.images,
            dimensions=tuple(DimensionShare(one, int(counts[one]) / self.images) for one in most if counts[one]),
            holders=HolderShares(cls, register, patch, outlier),
            images=self.images,
        )


def token_kinds(tokens: Float[Tensor, "b n d"], prefix: Sequence[str], outliers: Bool[Tensor, "b p"] | None) -> Tensor:
    """Index into `KINDS` of every token, `b n`."""
    kinds = torch.full(tokens.shape[:2], KINDS.index("patch"), device=tokens.device)
    for place, kind in enumerate(prefix):
        kinds[:, place] = KINDS.index(kind)
    if outliers is not None:
        kinds[:, len(prefix) :] += outliers.to(kinds)
    return kinds


def plot_massive_activations(found: Sequence[BlockActivations]) -> Figure:
    """Largest three magnitudes and the median after each block, on a logarithmic scale, with the main dimensions."""
    figure, grid = panels(1, 1, width=5.4, height=3.2)
    axes, blocks = grid[0, 0], [one.block for one in found]
    for rank, shade in enumerate((1.0, 0.6, 0.35)):
        values = [one.top[rank] for one in found]
        axes.plot(blocks, values, "o-", color=OUTLIER_COLOUR, alpha=shade, markersize=3, label=f"top {rank + 1}")
    axes.plot(blocks, [one.median for one in found], "o-", color="black", markersize=3, label="median")
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)
    axes.set_xlabel("block (counted from 0)")
    axes.set_ylabel("magnitude of activations")
    axes.legend(fontsize=7)
    main = ", ".join(f"{one.dimension} ({100 * one.share:.0f} %)" for one in found[-1].dimensions[:3])
    axes.set_title(f"largest one after the last block in dimension {main} of the images", fontsize=8)
    return figure
