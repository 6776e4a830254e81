"""What a model is worth by its number of registers (registers paper, figure 8, bottom)."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitreg_eval.analyses.panels import OUTLIER_COLOUR, panels
from vitreg_eval.metrics import Metric

COLOUR = "#1f77b4"


def plot_register_curves(results: Mapping[str, Mapping[str, Metric]]) -> Figure:
    """A panel for every metric that all results have, with its 95 % intervals.

    Args:
        results: metrics by number of registers, as `reg0`, `reg1`, ...; `auto` stands apart from the line.
    """
    common = [name for name in next(iter(results.values())) if all(name in metrics for metrics in results.values())]
    figure, grid = panels(1, max(len(common), 1), width=3.2, height=2.8)
    for axes, name in zip(grid[0], common, strict=False):
        draw_curve(axes, {which.removeprefix("reg"): metrics[name] for which, metrics in results.items()})
        axes.set_title(name, fontsize=9)
    return figure


def draw_curve(axes: Axes, metrics: Mapping[str, Metric]) -> None:
    """Values and intervals at even distances, in the order given."""
    values = np.array([metric.value for metric in metrics.values()])
    ends = np.array([metric.ci95 or (metric.value, metric.value) for metric in metrics.values()])
    beyond = np.stack([values - ends[:, 0], ends[:, 1] - values]).clip(min=0)
    counted = np.array([name.isdecimal() for name in metrics])
    places = np.arange(len(values))
    for part, style, colour in ((counted, "o-", COLOUR), (~counted, "s", OUTLIER_COLOUR)):
        if part.any():
            axes.errorbar(places[part], values[part], yerr=beyond[:, part], fmt=style, color=colour, capsize=3)
    axes.set_xticks(places, list(metrics))
    axes.set_xlabel("registers")
