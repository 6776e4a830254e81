"""Norms of patches over training, and over models (registers paper, figures 4b and 4c; study, figures 8c and 8d).

The paper sees outliers after a third of the training, and only in ViT-L and above. Spread and tail stand beside the
verdict, so that a change can be told without one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_core.outliers import emergence_block, find_outliers

from vitreg_eval.analyses.kinds import NORMAL_COLOUR
from vitreg_eval.analyses.panels import OUTLIER_COLOUR, panels, plain_log_ticks

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.9, 0.98, 0.999, 1.0)
MEDIAN = QUANTILES.index(0.5)
EDGES = np.geomspace(1e-2, 1e5, 281)
"""Of the bins of a norm, 40 to a power of ten."""


@dataclass(frozen=True)
class NormSummary:
    """The norms of one checkpoint or model, in one block, before the final norm."""

    quantiles: Float[np.ndarray, "9"]
    """At `QUANTILES`, from the smallest norm to the largest."""
    mad: float
    """Median absolute deviation from the median norm."""
    kurtosis: float
    """Excess kurtosis of the image-centred log norms; 0 for a normal law, large for a far tail."""
    outlier_fraction: float
    """Share of the patches that are outliers, 0 to 1; 0 where there is no outlier mode."""
    found: bool
    """Whether there is an outlier mode."""
    cutoff: float | None
    """Norm above which a patch is an outlier; None without a mode."""
    counts: Float[np.ndarray, " bins"]
    """Patches with a norm between neighbours in `EDGES`; those beyond count in the outer bins."""
    images: int


@dataclass(frozen=True)
class NormHistory:
    """Norms at each checkpoint of a training run, by increasing step."""

    steps: tuple[int, ...]
    checkpoints: tuple[NormSummary, ...]
    emergence_step: int | None
    """First step with an outlier mode that the next checkpoint confirms; None without one."""


def summarise_norms(norms: Float[Tensor, "b p"]) -> NormSummary:
    """Quantiles, spread, tail and verdict of the norms of one block's patches.

    Args:
        norms: L2 norms before the final norm, above 0.

    Raises:
        InputError: no norms, or zero, negative or non-finite ones.
    """
    found = find_outliers(norms)
    values = norms.cpu().double().numpy()
    return NormSummary(
        quantiles=np.quantile(values, QUANTILES),
        mad=float(np.median(np.abs(values - np.median(values)))),
        kurtosis=found.evidence.kurtosis,
        outlier_fraction=found.fraction,
        found=found.found,
        cutoff=found.cutoff,
        counts=np.histogram(values.clip(EDGES[0], EDGES[-1]), EDGES)[0].astype(float),
        images=len(values),
    )


def norm_history(steps: Sequence[int], checkpoints: Sequence[NormSummary]) -> NormHistory:
    """Put the summaries of checkpoints in line.

    Raises:
        InputError: not one step for every checkpoint, or steps that do not increase.
    """
    if len(steps) != len(checkpoints) or not steps:
        raise InputError(f"{len(steps)} steps and {len(checkpoints)} checkpoints; give one step for every checkpoint")
    for before, after in pairwise(steps):
        if after <= before:
            raise InputError(f"step {after} comes after step {before}; give checkpoints by increasing step")
    emergence = emergence_block([one.found for one in checkpoints])
    return NormHistory(tuple(steps), tuple(checkpoints), None if emergence is None else steps[emergence])


def plot_norm_history(found: NormHistory) -> Figure:
    """Quantiles over the steps; below them outlier share, spread over median, and kurtosis."""
    figure, grid = panels(2, 1, width=6.0, height=2.5)
    steps, quantiles = found.steps, np.stack([one.quantiles for one in found.checkpoints])
    draw_bands(grid[0, 0], np.array(steps, dtype=float), quantiles)
    grid[0, 0].set_ylabel("L2 norm of patch tokens")
    lines = {
        "outliers, % of patches": [100 * one.outlier_fraction for one in found.checkpoints],
        "MAD, % of the median": [100 * one.mad / one.quantiles[MEDIAN] for one in found.checkpoints],
        "kurtosis of log norms": [one.kurtosis for one in found.checkpoints],
    }
    for name, values in lines.items():
        grid[1, 0].plot(steps, values, "o-", markersize=3, label=name)
    grid[1, 0].set_yscale("symlog", linthresh=1)
    grid[1, 0].set_xlabel("step")
    if found.emergence_step is not None:
        for axes in grid[:, 0]:
            axes.axvline(found.emergence_step, color="gray", linestyle="--", label="outliers emerge")
    for axes in grid[:, 0]:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def draw_bands(axes: Axes, places: Float[np.ndarray, " n"], quantiles: Float[np.ndarray, "n 9"]) -> None:
    """Shaded ranges between quantiles, with lines for median and maximum."""
    for low, high, shade in ((1, 7, 0.2), (2, 4, 0.4)):
        label = f"{100 * QUANTILES[low]:g} to {100 * QUANTILES[high]:g} %"
        axes.fill_between(places, quantiles[:, low], quantiles[:, high], color=NORMAL_COLOUR, alpha=shade, label=label)
    axes.plot(places, quantiles[:, MEDIAN], "o-", color="black", markersize=3, label="median")
    axes.plot(places, quantiles[:, -1], "o-", color=OUTLIER_COLOUR, markersize=3, label="maximum")
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)


def plot_model_norms(names: Sequence[str], models: Sequence[NormSummary]) -> Figure:
    """Distributions side by side, their width by the logarithm of the number of patches, with the share of outliers."""
    figure, grid = panels(1, 1, width=max(3.5, 1.0 + 1.3 * len(names)), height=3.4)
    axes, centres = grid[0, 0], np.sqrt(EDGES[1:] * EDGES[:-1])
    for place, one in enumerate(models):
        reach = 0.42 * np.log1p(one.counts) / np.log1p(one.counts.max())
        axes.fill_betweenx(centres, place - reach, place + reach, step="mid", color=NORMAL_COLOUR, linewidth=0)
        axes.hlines(one.quantiles[MEDIAN], place - 0.42, place + 0.42, color="black", linewidth=1)
        if one.cutoff is not None:
            axes.hlines(one.cutoff, place - 0.42, place + 0.42, color=OUTLIER_COLOUR, linestyle="--", linewidth=1)
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)
    axes.set_ylim(min(one.quantiles[0] for one in models) / 1.5, max(one.quantiles[-1] for one in models) * 1.5)
    axes.set_xlim(-0.6, len(models) - 0.4)
    shares = [f"{100 * one.outlier_fraction:.3g} % outliers" if one.found else "no outliers" for one in models]
    labels = [f"{name}\n{share}" for name, share in zip(names, shares, strict=True)]
    axes.set_xticks(range(len(models)), labels, fontsize=8)
    axes.set_ylabel("L2 norm of patch tokens")
    axes.set_title("width: log of the number; line: median; dashed: cutoff", fontsize=8)
    return figure
