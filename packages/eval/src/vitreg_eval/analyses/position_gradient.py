"""Which stored positions a resize reads, and how much (registers paper, figure 11).

The gradient of the sum of the resized table with respect to the stored one. Without a low-pass filter some positions
count five times as much as others and some count negatively, in stripes: a trace that training leaves in the positions
and that outliers follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from vitreg_core.config import ViTConfig
from vitreg_core.embed import resize_positions

from vitreg_eval.analyses.panels import bare, panels

Grid = tuple[int, int]


@dataclass(frozen=True)
class PositionGradient:
    """How much each stored position counts in all resized ones together."""

    weights: Float[np.ndarray, "rows cols"]
    """They sum to the number of positions after the resize."""
    grid: Grid
    """Rows and columns after the resize."""
    antialias: bool
    offset: float
    """Added to the grid in the scale of the resize."""

    @property
    def column_sums(self) -> Float[np.ndarray, " cols"]:
        """How much each column counts."""
        return self.weights.sum(axis=0)

    @property
    def negative_share(self) -> float:
        """Part of the positions that count negatively, 0 to 1."""
        return float((self.weights < 0).mean())


def position_gradient(native: Grid, grid: Grid, *, antialias: bool, offset: float = 0.0) -> PositionGradient:
    """Push a gradient of one through the resize that our models use.

    Args:
        native: rows and columns of the stored positions; 16 x 16 in the figure.
        grid: rows and columns to resize to; 7 x 7 in the figure.
        antialias: filter before the grid shrinks.
        offset: 0, or .1 as in DINOv2 without registers.
    """
    table = torch.zeros(native[0] * native[1], 1, requires_grad=True)
    (weights,) = torch.autograd.grad(
        resize_positions(table, native, grid, antialias=antialias, offset=offset).sum(), table
    )
    return PositionGradient(weights.unflatten(0, native).squeeze(-1).double().numpy(), grid, antialias, offset)


def model_position_gradient(config: ViTConfig, grid: Grid) -> PositionGradient:
    """The same with the stored grid and the resize of a model."""
    return position_gradient(config.grid, grid, antialias=config.position_antialias, offset=config.position_offset)


def plot_position_gradients(found: Sequence[PositionGradient]) -> Figure:
    """Each map above its column sums; one colour scale, white at zero."""
    figure, grid = panels(2, len(found), width=3.0, height=2.6)
    reach = max(float(np.abs(one.weights).max()) for one in found)
    for axes, one in zip(grid[0], found, strict=True):
        shown = axes.imshow(one.weights, cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
        bare(axes, describe(one))
    for axes, one in zip(grid[1], found, strict=True):
        axes.bar(range(len(one.column_sums)), one.column_sums, color="#1f77b4")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.sharey(grid[1, 0])
        axes.set_xlabel("stored column")
    grid[1, 0].set_ylabel("sum of the gradient")
    figure.colorbar(shown, ax=grid[0], label="gradient")
    return figure


def describe(one: PositionGradient) -> str:
    """The resize, and how many positions count negatively."""
    rows, cols = one.weights.shape
    filtered = "with" if one.antialias else "no"
    offset = f", offset {one.offset:g}" if one.offset else ""
    head = f"{rows}x{cols} to {one.grid[0]}x{one.grid[1]}, {filtered} antialias{offset}"
    return f"{head}\n{100 * one.negative_share:.1f} % negative"
