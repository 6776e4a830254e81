"""Object discovery step by step, as in the register paper's figure of LOST: score, similarity, expansion, box."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitreg_eval.analyses.boxes import Box, add_box, add_legend
from vitreg_eval.analyses.panels import OUTLIER_COLOUR, TRUTH_COLOUR, bare, panels, show_image

COLUMNS = ("score (+ seed)", "similarity to seed", "voters", "mask, object", "box")


@dataclass(frozen=True)
class Steps:
    """How the object of one image was found."""

    image: Float[np.ndarray, "height width 3"]
    """0 to 1."""
    score: Float[np.ndarray, "rows cols"]
    """Inverse degree: the share of the patches that a patch is not similar to."""
    similarity: Float[np.ndarray, "rows cols"] | None
    """Dot product with the seed, bias included; None for a method without one."""
    voters: Bool[np.ndarray, "rows cols"] | None
    """Patches that vote for the mask."""
    mask: Bool[np.ndarray, "rows cols"]
    component: Bool[np.ndarray, "rows cols"]
    seed: tuple[int, int]
    """Row and column."""
    box: Box
    true: Sequence[Box]


def plot_steps(shown: Sequence[Steps]) -> Figure:
    """A row for each image; the cross is the seed, red is found, green is true."""
    figure, grid = panels(len(shown), len(COLUMNS))
    for title, axes in zip(COLUMNS, grid[0], strict=True):
        axes.set_title(title, fontsize=8)
    for row, steps in zip(grid, shown, strict=True):
        draw_map(row[0], steps.score, steps, "viridis", float(steps.score.max()))
        draw_similarity(row[1], steps)
        draw_map(row[2], None if steps.voters is None else steps.voters.astype(float), steps, "gray", 1.0)
        draw_map(row[3], steps.mask + 1.0 * steps.component, steps, "gray", 2.0)
        title = row[4].get_title()
        show_image(row[4], steps.image, title)
        for box in steps.true:
            add_box(row[4], box, TRUTH_COLOUR)
        add_box(row[4], steps.box, OUTLIER_COLOUR)
    add_legend(figure)
    return figure


def draw_map(axes: Axes, values: Float[np.ndarray, "rows cols"] | None, steps: Steps, colours: str, top: float) -> None:
    """One map of patches from 0 to `top` with the seed; nothing where a method has no such map."""
    bare(axes, axes.get_title())
    if values is None:
        axes.set_frame_on(False)
        return
    axes.imshow(values, cmap=colours, interpolation="nearest", vmin=min(0.0, float(values.min())), vmax=top or 1.0)
    axes.plot(steps.seed[1], steps.seed[0], "+", color=OUTLIER_COLOUR, markersize=7)


def draw_similarity(axes: Axes, steps: Steps) -> None:
    """Similarity to the seed, white at zero, where similar ends."""
    if steps.similarity is None:
        draw_map(axes, None, steps, "RdBu_r", 1.0)
        return
    draw_map(axes, steps.similarity, steps, "RdBu_r", 1.0)
    others = np.delete(steps.similarity.ravel(), steps.seed[0] * steps.similarity.shape[1] + steps.seed[1])
    reach = float(np.abs(others).max()) if others.size else 1.0
    axes.images[0].set_clim(-(reach or 1.0), reach or 1.0)
