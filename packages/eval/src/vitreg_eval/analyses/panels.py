"""Figures made of equal panels, without any global state."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

OUTLIER_COLOUR = "#d62728"
TRUTH_COLOUR = "#2ca02c"


def panels(rows: int, cols: int, *, width: float = 1.6, height: float = 1.7) -> tuple[Figure, np.ndarray]:
    """A figure of rows x cols axes; sizes in inches per panel. The axes come as a 2-D array."""
    figure = Figure(figsize=(cols * width, rows * height), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, cols, squeeze=False)


def show_image(axes: Axes, pixels: np.ndarray, title: str = "") -> None:
    """Draw an image `height width 3` in 0 to 1, or a ready map `height width`, without ticks."""
    axes.imshow(np.clip(pixels, 0, 1) if pixels.ndim == 3 else pixels, interpolation="nearest")
    bare(axes, title)


def plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis at its powers of ten alone, where there are any, so that labels never meet."""
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter("{x:g}")


def bare(axes: Axes, title: str = "") -> None:
    """Take ticks away and set a small title."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)


def image_rows(images: Sequence[np.ndarray], maps: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """Images in the top row, and one named row of maps below for each entry; each map has its own colour scale."""
    figure, grid = panels(1 + len(maps), len(images))
    for row, (name, pictures) in enumerate({"image": images, **maps}.items()):
        for axes, picture in zip(grid[row], pictures, strict=True):
            show_image(axes, picture)
        grid[row, 0].set_ylabel(fill(name, 18), fontsize=8)
    return figure
