"""Norms of tokens, by block and by kind (registers paper, figures 3, 4 and 7)."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from vitreg_core.outliers import Outliers

from vitreg_eval.analyses.panels import OUTLIER_COLOUR, panels, plain_log_ticks

QUANTILES = (0.5, 0.9, 0.98, 0.999, 1.0)


def norm_quantiles(norms: Float[Tensor, "depth b p"]) -> Float[np.ndarray, "depth 5"]:
    """Quantiles 50, 90, 98, 99.9 % and maximum of the norms after each block."""
    return np.quantile(norms.flatten(1).double().numpy(), QUANTILES, axis=1).T


def plot_norms_per_block(norms: Mapping[str, Float[Tensor, "depth b p"]], verdicts: Sequence[str] = ()) -> Figure:
    """Distribution of patch norms after each block, on log scale: one panel per model, darker where more tokens are."""
    figure, grid = panels(1, len(norms), width=max(3.2, 9 / len(norms)), height=3.4)
    low = min(float(values.min()) for values in norms.values())
    high = max(float(values.max()) for values in norms.values())
    for index, (axes, (name, values)) in enumerate(zip(grid[0], norms.items(), strict=True)):
        draw_blocks(axes, values, np.geomspace(max(low, 1e-3) * 0.9, high * 1.1, 80))
        axes.set_title(name + (f"\n{verdicts[index]}" if verdicts else ""), fontsize=9)
    grid[0][0].set_ylabel("L2 norm of patch tokens")
    return figure


def draw_blocks(axes: Axes, norms: Float[Tensor, "depth b p"], edges: np.ndarray) -> None:
    """One column of the 2-D histogram per block, and lines for median and maximum."""
    counts = np.stack([np.histogram(block.flatten().numpy(), bins=edges)[0] for block in norms], axis=1)
    blocks = np.arange(len(norms))
    axes.pcolormesh(np.arange(len(norms) + 1) - 0.5, edges, np.log1p(counts), cmap="Blues")
    quantiles = norm_quantiles(norms)
    axes.plot(blocks, quantiles[:, 0], color="black", linewidth=1, label="median")
    axes.plot(blocks, quantiles[:, -1], color=OUTLIER_COLOUR, linewidth=1, label="maximum")
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)
    axes.set_xlabel("block (counted from 0)")
    axes.legend(fontsize=7, loc="upper left")


def plot_norm_histogram(norms: Float[Tensor, "b p"], found: Outliers, title: str) -> Figure:
    """Histogram of the norms after one block, with the cutoff where there is one."""
    figure, grid = panels(1, 1, width=5.0, height=3.0)
    axes, values = grid[0][0], norms.flatten().numpy()
    axes.hist(values, bins=np.geomspace(max(values.min(), 1e-3), values.max() * 1.05, 80), color="#1f77b4")
    if found.cutoff is not None:
        axes.axvline(found.cutoff, color=OUTLIER_COLOUR, label=f"cutoff {found.cutoff:.4g}")
        axes.legend(fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_log_ticks(axes.xaxis)
    axes.set_xlabel("L2 norm of patch tokens")
    axes.set_ylabel("tokens")
    axes.set_title(title, fontsize=9)
    return figure


def plot_norms_by_kind(norms: Mapping[str, Float[np.ndarray, " n"]], title: str) -> Figure:
    """Histogram of norms in the last block for class token, each register and patches."""
    figure, grid = panels(1, 1, width=5.0, height=3.0)
    high = max(float(values.max()) for values in norms.values())
    low = min(float(values.min()) for values in norms.values())
    for name, values in norms.items():
        weights = np.full(len(values), 1 / len(values))
        bins = np.geomspace(max(low, 1e-3) * 0.95, high * 1.05, 70)
        grid[0][0].hist(values, bins=bins, weights=weights, histtype="step", label=name)
    grid[0][0].set_xscale("log")
    plain_log_ticks(grid[0][0].xaxis)
    grid[0][0].set_xlabel("L2 norm after the last block, before the final norm")
    grid[0][0].set_ylabel("share of the tokens of a kind")
    grid[0][0].legend(fontsize=8)
    grid[0][0].set_title(title, fontsize=9)
    return figure


def worst_images(mask: Bool[Tensor, "b p"], norms: Float[Tensor, "b p"], count: int) -> list[int]:
    """Indices of images from most to fewest outliers, evenly spread; ties by largest norm. A rule, not a choice."""
    score = mask.sum(dim=1).double() + norms.max(dim=1).values.double() / (norms.max().double() + 1)
    order = score.argsort(descending=True, stable=True).tolist()
    count = min(count, len(order))
    return [order[index * len(order) // count] for index in range(count)]
