"""Segmentations beside their pictures and the true masks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from vitreg_eval.analyses.panels import panels, show_image
from vitreg_eval.datasets.examples import IGNORE

MOST_NAMED = 20
"""Classes that have a colour of their own and a name in the legend: those with the largest area."""
WIDTH, TALLEST = 2.2, 1.5
"""Inches of a panel's width; most that a row's height may be over it."""
LEGEND = 1.7
"""Inches that the names of the classes take beside the panels."""
OTHERS, NOT_COUNTED = (0.25, 0.25, 0.25), (0.88, 0.88, 0.88)


@dataclass(frozen=True)
class Segmented:
    """A picture, the class of every pixel, and what was predicted."""

    picture: Image.Image
    truth: UInt8[np.ndarray, "height width"]
    predicted: UInt8[np.ndarray, "height width"]


def plot_segments(found: Sequence[Segmented], classes: Sequence[str]) -> Figure:
    """Draw picture, true mask and prediction of a few images in rows, with a legend of the classes that show most.

    Pixels that do not count are light grey in the true mask. Predictions are drawn everywhere.
    """
    named = most_frequent(found)
    colours = palette(named)
    figure, grid = panels(len(found), 3, width=WIDTH)
    heights = [WIDTH * min(one.truth.shape[0] / one.truth.shape[1], TALLEST) for one in found]
    grid[0, 0].get_gridspec().set_height_ratios(heights)
    figure.set_size_inches(3 * WIDTH + LEGEND, sum(heights) + 0.3)
    for row, one in zip(grid, found, strict=True):
        for axes, pixels in zip(
            row, (np.asarray(one.picture) / 255, colours[one.truth], colours[one.predicted]), strict=True
        ):
            show_image(axes, pixels)
    for axes, title in zip(grid[0], ("image", "truth", "prediction"), strict=True):
        axes.set_title(title, fontsize=8)
    labels = {classes[index]: colours[index] for index in named} | {"other classes": OTHERS, "not counted": NOT_COUNTED}
    handles = [Patch(color=colour, label=label) for label, colour in labels.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=7, frameon=False)
    return figure


def most_frequent(found: Sequence[Segmented]) -> list[int]:
    """Classes of the largest area in truth and predictions, at most as many as a legend names, in order."""
    counts = np.zeros(256, dtype=np.int64)
    for one in found:
        for mask in (one.truth, one.predicted):
            counts += np.bincount(mask.ravel(), minlength=256)
    counts[IGNORE] = 0
    return sorted(int(index) for index in np.argsort(-counts, kind="stable")[:MOST_NAMED] if counts[index] > 0)


def palette(named: Sequence[int]) -> Float[np.ndarray, "256 3"]:
    """Colours of all classes in 0 to 1: well apart for those that are named, strong ones first, grey for the others."""
    colours = np.tile(np.array(OTHERS), (256, 1))
    colours[IGNORE] = NOT_COUNTED
    strong_first = [*range(0, 20, 2), *range(1, 20, 2)]
    colours[list(named)] = colormaps["tab20"](strong_first[: len(named)])[:, :3]
    return colours
