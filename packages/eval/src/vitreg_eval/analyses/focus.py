"""Positional focus: where class token and registers look on average over a data set (registers study, figs. 10, 13)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from matplotlib.figure import Figure
from torch import Tensor

from vitreg_eval.analyses.outlier_positions import ring_profile
from vitreg_eval.analyses.panels import bare, panels
from vitreg_eval.analyses.register_similarity import token_names
from vitreg_eval.analyses.sums import Sums


@dataclass(frozen=True)
class FocusSums(Sums):
    """Maps of many images, each made to sum to 1 before it is added."""

    total: Float64[Tensor, "m rows cols"]
    entropies: Float64[Tensor, " m"]
    """Entropy of each image's own map, summed, in nats."""
    images: int


@dataclass(frozen=True)
class Focus:
    """Mean attention maps of class token and registers."""

    names: tuple[str, ...]
    """Token of each map: `cls`, `register 0`, ..."""
    maps: Float64[Tensor, "m rows cols"]
    """Mean over images; each sums to 1."""
    entropy: Float64[Tensor, " m"]
    """Of the mean map, in nats: log p where the positions are all alike."""
    image_entropy: Float64[Tensor, " m"]
    """Mean over images of the entropy of each one's own map, in nats; never above `entropy`."""
    centre: Float64[Tensor, "m 2"]
    """Centre of mass, down and right, as part of the image's height and width; 0.5 is the middle."""
    rings: Float64[Tensor, "m rings"]
    """Mean attention of a patch by its distance to the border in patches, over that of an even map; 1 is even."""
    images: int
    """Images that were averaged over."""

    @property
    def relative_entropy(self) -> Float64[Tensor, " m"]:
        """Entropy of the mean map over log p, 0 (one patch) to 1 (even); 1 for a single patch."""
        most = math.log(self.maps[0].numel())
        return self.entropy / most if most else torch.ones_like(self.entropy)


def focus_sums(maps: Float[Tensor, "b m rows cols"]) -> FocusSums:
    """Maps of a batch, each made to sum to 1, and their entropies."""
    maps = maps.double()
    maps = maps / maps.sum(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return FocusSums(maps.sum(dim=0), entropy(maps).sum(dim=0), len(maps))


def positional_focus(sums: FocusSums, *, class_token: bool) -> Focus:
    """Means over all images of the sums; the first map is that of the class token where there is one."""
    maps = sums.total / sums.images
    rings = np.stack([ring_profile(one) for one in maps.cpu().numpy()]) * maps[0].numel()
    return Focus(
        names=token_names(len(maps), class_token=class_token),
        maps=maps,
        entropy=entropy(maps),
        image_entropy=sums.entropies / sums.images,
        centre=centre_of_mass(maps),
        rings=torch.from_numpy(rings),
        images=sums.images,
    )


def entropy(maps: Float[Tensor, "*m rows cols"]) -> Float[Tensor, "*m"]:
    """Entropy of maps that sum to 1, in nats."""
    return torch.special.entr(maps).sum(dim=(-2, -1))


def centre_of_mass(maps: Float[Tensor, "*m rows cols"]) -> Float[Tensor, "*m 2"]:
    """Where the mass of maps that sum to 1 lies, down and right, 0 to 1; patches count at their centres."""
    rows, cols = maps.shape[-2:]
    down = (torch.arange(rows).to(maps) + 0.5) / rows
    right = (torch.arange(cols).to(maps) + 0.5) / cols
    return torch.stack([maps.sum(dim=-1) @ down, maps.sum(dim=-2) @ right], dim=-1)


def plot_focus(models: Mapping[str, Focus]) -> Figure:
    """Mean maps, one row for each named model, with a colour range of the row's own; the ring profile at its end.

    A cross marks the centre of mass.
    """
    columns = max(len(found.names) for found in models.values())
    figure, grid = panels(len(models), columns + 1, width=1.8, height=2.0)
    for axes, (name, found) in zip(grid, models.items(), strict=True):
        high = float(found.maps.max())
        rows, cols = found.maps.shape[-2:]
        for index, token in enumerate(found.names):
            axes[index].imshow(found.maps[index].numpy(), vmin=0, vmax=high)
            down, right = found.centre[index].tolist()
            axes[index].plot(right * cols - 0.5, down * rows - 0.5, "+", color="white")
            bare(axes[index], token)
            axes[index].set_xlabel(f"entropy {found.relative_entropy[index]:.3f} of log p", fontsize=7)
            axes[-1].plot(found.rings[index].numpy(), "o-", markersize=2, linewidth=1, label=token)
        for empty in axes[len(found.names) : -1]:
            empty.set_axis_off()
        axes[0].set_ylabel(f"{name}\n{found.images} images", fontsize=8)
        axes[-1].axhline(1, color="grey", linewidth=0.5)
        axes[-1].set_xlabel("patches to the border", fontsize=7)
        axes[-1].set_title("over an even map", fontsize=8)
        axes[-1].tick_params(labelsize=6)
        axes[-1].legend(fontsize=5)
    return figure
