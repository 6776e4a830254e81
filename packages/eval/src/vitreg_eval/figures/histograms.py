"""Histograms of norms, one below the other on the same axes, so that models can be compared."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from vitreg_core.outliers import Outliers

from vitreg_eval.analyses.kinds import NORMAL_COLOUR
from vitreg_eval.analyses.panels import OUTLIER_COLOUR, panels, plain_log_ticks

BINS = 80
OWN_COLOUR = "#555555"


def plot_histograms(
    norms: Mapping[str, Float[Tensor, "b p"]], found: Sequence[Outliers], cutoff: float | None
) -> Figure:
    """Both axes logarithmic; the rule's cutoff is dashed, one's own dotted.

    Args:
        norms: of every model, above 0.
        found: the rule's verdict on each.
        cutoff: one's own, if any.
    """
    figure, grid = panels(len(norms), 1, width=6.0, height=2.2)
    low = min(float(values.min()) for values in norms.values())
    high = max(float(values.max()) for values in norms.values())
    edges = np.geomspace(max(low, 1e-3) * 0.95, max(high, cutoff or 0) * 1.1, BINS + 1)
    for axes, (name, values), one in zip(grid[:, 0], norms.items(), found, strict=True):
        axes.stairs(np.histogram(values.numpy(), edges)[0], edges, fill=True, color=NORMAL_COLOUR)
        if one.cutoff is not None:
            label = f"rule: {one.cutoff:.4g}, {one.fraction:.3%} above"
            axes.axvline(one.cutoff, color=OUTLIER_COLOUR, linestyle="--", label=label)
        if cutoff is not None:
            share = float((values > cutoff).double().mean())
            axes.axvline(cutoff, color=OWN_COLOUR, linestyle=":", label=f"own: {cutoff:.4g}, {share:.3%} above")
        axes.set_xscale("log")
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(bottom=0.7)
        axes.set_xlim(edges[0], edges[-1])
        plain_log_ticks(axes.xaxis)
        axes.set_ylabel("tokens")
        axes.set_title(name if one.found else f"{name}: no outlier mode", fontsize=9)
        if axes.lines:
            axes.legend(fontsize=7, loc="upper right")
    grid[-1, 0].set_xlabel("L2 norm of patch tokens after the last block")
    return figure
