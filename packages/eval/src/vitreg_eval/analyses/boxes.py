"""Boxes found by LOST, beside the true ones."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from vitreg_eval.analyses.panels import OUTLIER_COLOUR, TRUTH_COLOUR, panels, show_image

Box = Sequence[int]


def plot_boxes(images: Sequence[np.ndarray], found: Sequence[Box], true: Sequence[Sequence[Box]]) -> Figure:
    """Draw each image with its true boxes (green) and the one found (red).

    Args:
        images: `height width 3`, values 0 to 1.
        found: x0, y0, x1, y1 in pixels for each image.
        true: such boxes for each image; may be empty.
    """
    cols = min(len(images), 8)
    rows = -(-len(images) // cols)
    figure, grid = panels(rows, cols)
    for axes in grid.flat[len(images) :]:
        axes.axis("off")
    for axes, image, box, boxes in zip(grid.flat, images, found, true, strict=False):
        show_image(axes, image)
        for target in boxes:
            add_box(axes, target, TRUTH_COLOUR)
        add_box(axes, box, OUTLIER_COLOUR)
    add_legend(figure)
    return figure


def add_legend(figure: Figure) -> None:
    """Say below the panels which box is which."""
    lines = [
        Line2D([], [], color=colour, label=name) for name, colour in (("true", TRUTH_COLOUR), ("found", OUTLIER_COLOUR))
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=7, frameon=False)


def add_box(axes: Axes, box: Box, colour: str) -> None:
    """Outline one box; pixel centres are at whole numbers, so edges are at halves. One along the border shows whole."""
    x0, y0, x1, y1 = box
    corner, width, height = (x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=1.8, clip_on=False))
