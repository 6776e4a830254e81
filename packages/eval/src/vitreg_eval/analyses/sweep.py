"""CorLoc over the bias, a line for each facet and block."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

Point = tuple[float, float]
"""Bias, and CorLoc from 0 to 1."""


def plot_sweep(lines: Mapping[str, Sequence[Point]], whole_image: float, relative: bool) -> Figure:  # noqa: FBT001
    """Draw the whole curve, so that a reader sees how much the choice of the bias is worth.

    Args:
        lines: by facet and block, points by increasing bias.
        whole_image: CorLoc of the whole image as box, drawn as a dashed line.
        relative: biases are in units of the mean squared length of the patches.
    """
    figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(lines.items()):
        style = ("-", "--", ":")[index // 10 % 3]  # the ten colours come again
        axes.plot(*zip(*points, strict=True), style, marker=".", linewidth=1.2, label=name)
    axes.axhline(whole_image, color="gray", linestyle="--", linewidth=1, label="whole image")
    axes.set_xlabel("bias / mean squared patch length" if relative else "bias")
    axes.set_ylabel("CorLoc")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return figure
