"""Whether class token and registers look at objects: overlap of their attention maps with masks of objects."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.analyses.panels import OUTLIER_COLOUR, panels
from vitreg_eval.analyses.register_similarity import token_names
from vitreg_eval.metrics import Metric, measure


@dataclass(frozen=True)
class MapOverlap:
    """Overlap with the objects of every image that has any; 0 to 1, at the best threshold of each map."""

    names: tuple[str, ...]
    """Token of each map: `cls`, `register 0`, ..."""
    iou: Float64[Tensor, "b m"]
    """Of every image."""
    mean: Float64[Tensor, " m"]
    """Mean over images."""
    spread: Float64[Tensor, " m"]
    """Standard deviation over images; 0 for a single one."""
    swapped: Float64[Tensor, " m"]
    """Mean where each image's objects meet the maps of the next image: what positions alone would give."""
    floor: float
    """Mean share of the objects in the image, which even a map without content reaches by taking all patches."""
    best: tuple[Metric, ...]
    """Of each register: part of the images whose objects it meets best of all registers; equal ones share an image.
    Empty for fewer than two registers."""
    left_out: int
    """Images without an object on the patch grid."""

    @property
    def chance(self) -> float:
        """Part of the images that each register would be the best for if none stood out."""
        return 1 / max(len(self.best), 1)

    @property
    def consistent(self) -> tuple[str, ...]:
        """Registers that meet the objects best more often than chance: their whole interval is above it.

        A small margin suffices for that, even between untrained registers: read it beside `mean` and `swapped`.
        """
        registers = self.names[len(self.names) - len(self.best) :]
        return tuple(
            name
            for name, one in zip(registers, self.best, strict=True)
            if one.ci95 is not None and one.ci95[0] > self.chance
        )


@dataclass(frozen=True)
class ClassOverlap:
    """Overlap with the objects of each class, over the images that show it."""

    names: tuple[str, ...]
    """Token of each column."""
    classes: tuple[str, ...]
    """Class of each row."""
    mean: Float64[Tensor, "classes m"]
    """Mean over the images that show the class."""
    spread: Float64[Tensor, "classes m"]
    """Standard deviation over them; 0 for a single one."""
    images: tuple[int, ...]
    """How many images show each class."""


def map_overlap(
    maps: Float[Tensor, "b m rows cols"], masks: Bool[Tensor, "b rows cols"], *, class_token: bool, seed: int = 0
) -> MapOverlap:
    """Overlap of each map with the objects of its image.

    Args:
        maps: attention of class token, if there is one, and registers over the patches.
        masks: patches that show an object.
        class_token: whether the first map is that of the class token.
        seed: of the intervals.

    Raises:
        InputError: no image has an object.
    """
    there = masks.flatten(1).any(dim=1)
    if not there.any():
        raise InputError(f"none of {len(masks)} masks has an object on the patch grid; give images with objects")
    maps, masks = maps[there], masks[there]
    iou = best_iou(maps, masks)
    registers = iou[:, int(class_token) :]
    shares = best_shares(registers) if registers.shape[1] > 1 else registers[:, :0]
    return MapOverlap(
        names=token_names(maps.shape[1], class_token=class_token),
        iou=iou,
        mean=iou.mean(dim=0),
        spread=iou.std(dim=0, correction=min(1, len(iou) - 1)),
        swapped=best_iou(maps.roll(-1, dims=0), masks).mean(dim=0),
        floor=float(masks.double().mean()),
        best=tuple(measure(share, seed=seed) for share in shares.T),
        left_out=int((~there).sum()),
    )


def overlap_by_class(
    maps: Float[Tensor, "b m rows cols"],
    classes: Int[Tensor, "b rows cols"],
    names: Mapping[int, str],
    *,
    class_token: bool,
) -> ClassOverlap:
    """Overlap of each map with the patches of each class, where the image shows it.

    Args:
        maps: attention of class token, if there is one, and registers over the patches.
        classes: class of each patch; values without a name count for nothing.
        names: classes by value.
        class_token: whether the first map is that of the class token.

    Raises:
        InputError: no patch has one of the classes.
    """
    rows = {}
    for value, name in names.items():
        shown = (classes == value).flatten(1).any(dim=1)
        if shown.any():
            rows[name] = best_iou(maps[shown], classes[shown] == value)
    if not rows:
        raise InputError(f"no patch of {len(classes)} images has one of the {len(names)} classes; check their values")
    return ClassOverlap(
        names=token_names(maps.shape[1], class_token=class_token),
        classes=tuple(rows),
        mean=torch.stack([iou.mean(dim=0) for iou in rows.values()]),
        spread=torch.stack([iou.std(dim=0, correction=min(1, len(iou) - 1)) for iou in rows.values()]),
        images=tuple(len(iou) for iou in rows.values()),
    )


def best_iou(maps: Float[Tensor, "b m rows cols"], masks: Bool[Tensor, "b rows cols"]) -> Float64[Tensor, "b m"]:
    """Intersection over union of each map, cut at the value that gives most, with its image's mask; 0 for an empty one.

    All distinct values are tried: a cut takes every patch with that value or more.
    """
    values, order = maps.flatten(-2).sort(dim=-1, descending=True)
    truth = masks.flatten(-2)[:, None].expand_as(order)
    hits = truth.gather(-1, order).double().cumsum(dim=-1)
    taken = torch.arange(1, values.shape[-1] + 1, device=values.device)
    iou = hits / (taken + hits[..., -1:] - hits)
    last = torch.ones_like(values, dtype=torch.bool)
    last[..., :-1] = values[..., 1:] != values[..., :-1]  # patches of one value are taken together
    return iou.where(last, 0.0).amax(dim=-1)


def best_shares(iou: Float64[Tensor, "b r"]) -> Float64[Tensor, "b r"]:
    """1 for the largest of each row, 0 for the others; equal ones share it."""
    best = iou == iou.amax(dim=1, keepdim=True)
    return best / best.sum(dim=1, keepdim=True).double()


def plot_overlap(found: MapOverlap) -> Figure:
    """Overlap of each token over the images, and how often each register is the best one."""
    figure, grid = panels(1, 2 if found.best else 1, width=max(3.4, 0.5 * len(found.names) + 1.4), height=3.2)
    places = np.arange(1, len(found.names) + 1)
    axes = grid[0, 0]
    axes.boxplot(found.iou.numpy(), tick_labels=list(found.names), showmeans=True)
    axes.scatter(places, found.swapped.numpy(), marker="_", s=200, color="black", label="maps of another image")
    axes.axhline(found.floor, color="grey", linestyle=":", label="all patches")
    axes.set_ylabel("IoU with objects, best threshold")
    axes.set_title(f"{len(found.iou)} images; boxes: quartiles, triangles: mean", fontsize=8)
    axes.set_ylim(-0.02, 1.3)  # room for the legend
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(fontsize=6, loc="upper right")
    axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    if found.best:
        draw_best(grid[0, 1], found)
    return figure


def draw_best(axes: Axes, found: MapOverlap) -> None:
    """How often each register is the best one, against chance."""
    registers = found.names[len(found.names) - len(found.best) :]
    ends = np.array([one.ci95 or (one.value, one.value) for one in found.best])
    values = np.array([one.value for one in found.best])
    beyond = np.stack([values - ends[:, 0], ends[:, 1] - values]).clip(min=0)
    axes.errorbar(np.arange(len(values)), values, yerr=beyond, fmt="o", capsize=3)
    axes.axhline(found.chance, color=OUTLIER_COLOUR, linestyle=":", label="chance")
    axes.set_xticks(np.arange(len(values)), registers, rotation=90, fontsize=7)
    axes.set_ylabel("part of the images where it is best")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize=6)


def plot_class_overlap(found: ClassOverlap) -> Figure:
    """Mean overlap of each token with each class, and its spread over images, as numbers on colours."""
    height = max(2.2, 0.24 * len(found.classes) + 1.2)
    figure, grid = panels(1, 1, width=max(3.6, 0.75 * len(found.names) + 2.2), height=height)
    axes = grid[0, 0]
    drawn = axes.imshow(found.mean.numpy(), vmin=0, vmax=1, aspect="auto")
    labels = [f"{name} ({count})" for name, count in zip(found.classes, found.images, strict=True)]
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xticks(range(len(found.names)), found.names, rotation=90, fontsize=7)
    for row, col in np.ndindex(*found.mean.shape):
        mean, spread = float(found.mean[row, col]), float(found.spread[row, col])
        colour = "black" if mean > 0.6 else "white"
        axes.text(col, row, f"{mean:.2f} ± {spread:.2f}", ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(drawn, ax=axes, label="IoU, best threshold; ± over images")
    return figure
