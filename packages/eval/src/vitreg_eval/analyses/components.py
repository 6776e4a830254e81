"""First principal component of patch tokens over a set of images (registers paper, figure 15)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64
from matplotlib.figure import Figure
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.analyses.panels import bare, panels, show_image

RANGES = (3, 30)
"""Ends of the colour ranges, in standard deviations: what most patches do, and the tails that the paper shows."""
NORMAL_MAD = 0.6744897501960817
"""Median absolute deviation of a normal law with standard deviation 1."""


@dataclass(frozen=True)
class Scatter:
    """Mean and scatter of vectors; `first + second` is that of both together, whatever their means."""

    mean: Float64[Tensor, " d"]
    scatter: Float64[Tensor, "d d"]
    """Sum of the products of what is left when the mean is taken away."""
    count: int
    """Vectors."""

    def __add__(self, other: "Scatter") -> "Scatter":
        """Of the vectors of both (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        between = torch.outer(apart, apart) * (self.count * other.count / count)
        return Scatter(self.mean + apart * (other.count / count), self.scatter + other.scatter + between, count)


@dataclass(frozen=True)
class Component:
    """The direction in which vectors vary most."""

    mean: Float64[Tensor, " d"]
    direction: Float64[Tensor, " d"]
    """Of length 1; its largest entry in magnitude is positive."""
    explained: float
    """Part of the variance that lies along it, 0 to 1."""


@dataclass(frozen=True)
class ComponentMaps:
    """Patches along a component, in robust standard deviations of the normal patches from their median."""

    maps: Float64[Tensor, "b rows cols"]
    middle: float
    """Median of the normal patches along the component, from the mean of all; in units of the tokens."""
    deviation: float
    """Robust standard deviation of the normal patches: median absolute deviation / 0.674; in units of the tokens."""


def patch_scatter(patches: Float[Tensor, "b p d"]) -> Scatter:
    """Mean and scatter of the patches of a batch."""
    flat = rearrange(patches, "b p d -> (b p) d").double()
    mean = flat.mean(dim=0)
    return Scatter(mean, (flat - mean).T @ (flat - mean), len(flat))


def first_component(scatter: Scatter) -> Component:
    """The direction of the largest variance.

    Raises:
        InputError: tokens that are not finite, or all the same.
    """
    if not (scatter.scatter.isfinite().all() and scatter.scatter.any()):
        raise InputError(
            f"{scatter.count} tokens that are all the same or not finite have no component; "
            "run the model in fp32, or check its weights"
        )
    values, vectors = torch.linalg.eigh(scatter.scatter)
    direction = vectors[:, -1]
    direction = direction * direction[direction.abs().argmax()].sign()
    return Component(scatter.mean, direction, float(values[-1] / values.clamp_min(0).sum()))


def component_maps(
    component: Component,
    patches: Float[Tensor, "b p d"],
    grid: tuple[int, int],
    normal: Bool[Tensor, "b p"] | None = None,
) -> ComponentMaps:
    """Patches along the component, centred and scaled by the normal ones, so that outliers stand far out.

    Args:
        component: fitted on the patches of the whole set.
        patches: of the images to show.
        grid: rows and columns of patches.
        normal: patches that are no outliers; all count as normal if not given, or where none is.
    """
    along = (patches.double() - component.mean) @ component.direction
    bulk = along.flatten() if normal is None or not normal.any() else along[normal]
    middle = bulk.median()
    deviation = (bulk - middle).abs().median() / NORMAL_MAD
    scaled = (along - middle) / deviation.clamp_min(torch.finfo(torch.float64).tiny)
    maps = rearrange(scaled, "b (rows cols) -> b rows cols", rows=grid[0], cols=grid[1])
    return ComponentMaps(maps, float(middle), float(deviation))


def plot_components(images: Sequence[np.ndarray], models: Mapping[str, ComponentMaps]) -> Figure:
    """One row per image: the image, then the map of each named model in both colour ranges."""
    figure, grid = panels(len(images), 1 + len(RANGES) * len(models), width=1.7, height=1.8)
    for row, (axes, image) in enumerate(zip(grid, images, strict=True)):
        show_image(axes[0], image, "image" if row == 0 else "")
        shown = [(end, name, found) for end in RANGES for name, found in models.items()]
        for one, (end, name, found) in zip(axes[1:], shown, strict=True):
            one.imshow(found.maps[row].numpy(), vmin=-end, vmax=end, cmap="RdBu_r", interpolation="nearest")
            bare(one, f"{name}\n-{end} to {end} std" if row == 0 else "")
    return figure
