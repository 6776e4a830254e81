"""Predicted depth beside the true one."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from vitreg_eval.analyses.panels import panels, show_image

COLOURS = "Spectral"
MISSING = "#444444"
"""Where there is no reading."""


def plot_depth(
    images: Sequence[Float[np.ndarray, "height width 3"]],
    true: Sequence[Float[np.ndarray, "height width"]],
    predicted: Sequence[Float[np.ndarray, "height width"]],
    max_depth: float,
) -> Figure:
    """Images, their depth and the predictions in three rows with one colour scale, in metres.

    Args:
        images: values 0 to 1.
        true: metres; grey where not between 0 and `max_depth`.
        predicted: metres.
        max_depth: metres beyond which nothing counts.
    """
    height, width = images[0].shape[:2]
    figure, grid = panels(3, len(images), width=1.8, height=1.55 * height / width + 0.1)
    known = [np.where((depth > 0) & (depth <= max_depth), depth, np.nan) for depth in true]
    near, far = np.nanquantile(np.concatenate([depth.ravel() for depth in (*known, *predicted)]), [0.005, 0.995])
    for axes, image in zip(grid[0], images, strict=True):
        show_image(axes, image)
    for row, depths in zip(grid[1:], (known, predicted), strict=True):
        for axes, depth in zip(row, depths, strict=True):
            show_image(axes, depth)
            shown = axes.images[0]
            shown.set(cmap=COLOURS, clim=(near, far))
            axes.set_facecolor(MISSING)
    for axes, name in zip(grid[:, 0], ("image", "true depth\n(grey: none)", "predicted"), strict=True):
        axes.set_ylabel(name, fontsize=8)
    bar = figure.colorbar(shown, ax=grid[1:], label="depth in metres", extend="both", shrink=0.9)
    bar.ax.tick_params(labelsize=7)
    return figure
