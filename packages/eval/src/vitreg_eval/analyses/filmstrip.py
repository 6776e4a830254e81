"""Attention maps of class token and registers over the snapshots of a training (registers study, figures 9 and 12)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.analyses.attention import peakiness
from vitreg_eval.analyses.panels import bare, panels, show_image
from vitreg_eval.analyses.register_similarity import token_names


@dataclass(frozen=True)
class Filmstrip:
    """Images chosen by what training did to their peaks, and the peakiness that they were chosen by."""

    removed: int
    """Index of the image whose peakiness fell most from the first to the last snapshot."""
    persistent: int
    """Index of the image whose peakiness fell least, or grew most."""
    peakiness: Float[Tensor, "snapshots b"]
    """Largest over median value of the first map (the class token's, where there is one), 1 or more."""
    names: tuple[str, ...]
    """Token of each map: `cls`, `register 0`, ..."""


def filmstrip(maps: Float[Tensor, "snapshots b prefix rows cols"], *, class_token: bool) -> Filmstrip:
    """Choose the image that lost most of its peakiness, and the one that kept it; of equal ones the first.

    Args:
        maps: of the same images at several snapshots, in the order of training.
        class_token: whether the first map is that of the class token.

    Raises:
        InputError: fewer than two snapshots.
    """
    if len(maps) < 2:
        raise InputError(f"{len(maps)} snapshot shows no change; give two or more checkpoints of one training")
    scores = peakiness(maps[:, :, 0])
    drop = (scores[0] - scores[-1]).nan_to_num(0.0)  # infinite before and after is no change
    names = token_names(maps.shape[2], class_token=class_token)
    return Filmstrip(int(drop.argmax()), int(drop.argmin()), scores, names)


def plot_filmstrip(
    found: Filmstrip,
    maps: Float[Tensor, "snapshots b prefix rows cols"],
    images: Sequence[np.ndarray],
    labels: Sequence[str],
) -> Figure:
    """The two images, and for each one row per token and one column per snapshot; each row has one colour range.

    Args:
        found: of the same maps.
        maps: attention of class token and registers.
        images: pixels in 0 to 1 of the removed and the persistent one.
        labels: what stands above each snapshot, such as its step.
    """
    tokens = len(found.names)
    figure, grid = panels(2 * tokens, 1 + len(maps), width=1.35, height=1.4)
    kinds = zip(("removed", "persistent"), (found.removed, found.persistent), images, strict=True)
    for number, (kind, index, image) in enumerate(kinds):
        rows = grid[number * tokens : (number + 1) * tokens]
        show_image(rows[0, 0], image, kind)
        for empty in rows[1:, 0]:
            empty.set_axis_off()
        draw_strip(rows[:, 1:], maps[:, index], found.names)
        for axes, label, score in zip(rows[0, 1:], labels, found.peakiness[:, index].tolist(), strict=True):
            axes.set_title(f"{label}\nmax/median {score:,.1f}", fontsize=7)
    return figure


def draw_strip(rows: np.ndarray, maps: Float[Tensor, "snapshots prefix rows cols"], names: Sequence[str]) -> None:
    """Maps of one image: one row per token, one column per snapshot."""
    for token, (row, name) in enumerate(zip(rows, names, strict=True)):
        high = float(maps[:, token].max())
        for axes, snapshot in zip(row, maps[:, token].float(), strict=True):
            axes.imshow(snapshot.numpy(), vmin=0, vmax=high, interpolation="nearest")
            bare(axes)
        row[0].set_ylabel(name, fontsize=7)
