"""How alike the attention maps of registers are, and how that changes in training (registers study, figure 11)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from vitreg_eval.analyses.panels import panels
from vitreg_eval.analyses.sums import Sums


@dataclass(frozen=True)
class SimilaritySums(Sums):
    """Similarities of the maps of each image, summed over images."""

    cosine: Float64[Tensor, "m m"]
    pearson: Float64[Tensor, "m m"]
    images: int


@dataclass(frozen=True)
class MapSimilarity:
    """Similarity of every pair of maps within an image, averaged over images."""

    names: tuple[str, ...]
    """Token of each row and column: `cls`, `register 0`, ..."""
    cosine: Float64[Tensor, "m m"]
    """0 to 1. Of maps that are positive everywhere it is high by construction."""
    pearson: Float64[Tensor, "m m"]
    """Correlation over patches, -1 to 1: the same after each map has lost its mean; 0 where one is even."""
    images: int
    """Images that were averaged over."""

    @property
    def mean_cosine(self) -> float | None:
        """Over all pairs of different registers; None for fewer than two registers."""
        return self.mean_of_pairs(self.cosine)

    @property
    def mean_pearson(self) -> float | None:
        """Over all pairs of different registers; None for fewer than two registers."""
        return self.mean_of_pairs(self.pearson)

    def mean_of_pairs(self, matrix: Float64[Tensor, "m m"]) -> float | None:
        """Mean over the pairs of different registers."""
        registers = [index for index, name in enumerate(self.names) if name != "cls"]
        pairs = torch.combinations(torch.tensor(registers), 2) if len(registers) > 1 else None
        return None if pairs is None else float(matrix[pairs[:, 0], pairs[:, 1]].mean())


@dataclass(frozen=True)
class SimilarityCurve:
    """Mean similarity of the register maps at several checkpoints of one training."""

    progress: tuple[float, ...]
    """Share of the training behind each checkpoint, 0 to 1."""
    cosine: tuple[float, ...]
    pearson: tuple[float, ...] = ()
    """Empty where it is not known."""


PUBLISHED = SimilarityCurve(
    tuple(epoch / 799 for epoch in (0, 19, 39, 99, 299, 399, 599, 799)),
    (0.995, 0.876, 0.982, 0.960, 0.951, 0.950, 0.941, 0.929),
)
"""DeiT-III-S/16 with 4 registers, 800 epochs, 3,925 images of Imagenette: notebook of the registers study."""


def token_names(maps: int, *, class_token: bool) -> tuple[str, ...]:
    """Names of so many prefix tokens: `cls` if there is one, then `register 0` and so on."""
    first = ("cls",) if class_token else ()
    return first + tuple(f"register {index}" for index in range(maps - len(first)))


def similarity_sums(maps: Float[Tensor, "b m rows cols"]) -> SimilaritySums:
    """Cosine and correlation of every pair of maps, summed over the images of a batch."""
    flat = maps.flatten(-2).double()
    centred = flat - flat.mean(dim=-1, keepdim=True)
    centred = centred.where(centred.abs() > 1e-6 * flat.abs().mean(dim=-1, keepdim=True), 0.0)  # rounding is no pattern
    return SimilaritySums(gram(flat), gram(centred), len(maps))


def gram(maps: Float64[Tensor, "b m p"]) -> Float64[Tensor, "m m"]:
    """Cosines of all pairs, summed over images; 0 with a map of zeros."""
    units = F.normalize(maps, dim=-1, eps=torch.finfo(torch.float64).tiny)
    return einsum(units, units, "b i p, b j p -> i j")


def map_similarity(sums: SimilaritySums, *, class_token: bool) -> MapSimilarity:
    """Means over all images of the sums; the first map is that of the class token where there is one."""
    names = token_names(len(sums.cosine), class_token=class_token)
    return MapSimilarity(names, sums.cosine / sums.images, sums.pearson / sums.images, sums.images)


def similarity_curve(by_progress: Mapping[float, MapSimilarity]) -> SimilarityCurve:
    """Means over pairs of registers at checkpoints, by the share of training behind each.

    A checkpoint with fewer than two registers is left out.
    """
    known = [
        (progress, found.mean_cosine, found.mean_pearson)
        for progress, found in sorted(by_progress.items())
        if found.mean_cosine is not None and found.mean_pearson is not None
    ]
    return SimilarityCurve(*(tuple(one[field] for one in known) for field in range(3)))


def plot_similarity(found: MapSimilarity) -> Figure:
    """Both matrices, with their values."""
    size = max(2.6, 0.55 * len(found.names))
    figure, grid = panels(1, 2, width=size + 0.6, height=size + 0.4)
    kinds = (("cosine", found.cosine, found.mean_cosine), ("correlation", found.pearson, found.mean_pearson))
    for axes, (kind, matrix, mean) in zip(grid[0], kinds, strict=True):
        draw_matrix(axes, matrix.numpy(), found.names)
        axes.set_title(kind if mean is None else f"{kind}, registers {mean:.3f}", fontsize=8)
    figure.suptitle(f"attention maps, mean over {found.images} images", fontsize=9)
    return figure


def draw_matrix(axes: Axes, matrix: np.ndarray, names: Sequence[str]) -> None:
    """One matrix of similarities, from -1 (blue) to 1 (red)."""
    axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    if len(names) <= 10:  # beyond that numbers would meet
        for row, col in np.ndindex(*matrix.shape):
            colour = "white" if abs(matrix[row, col]) > 0.7 else "black"
            axes.text(col, row, f"{matrix[row, col]:.2f}", ha="center", va="center", fontsize=6, color=colour)


def plot_similarity_curves(curves: Mapping[str, SimilarityCurve]) -> Figure:
    """Mean cosine and mean correlation of the register maps over training; one line for each named training."""
    figure, grid = panels(1, 2, width=3.6, height=2.8)
    for axes, kind in zip(grid[0], ("cosine", "pearson"), strict=True):
        for index, (name, curve) in enumerate(curves.items()):
            values = getattr(curve, kind)
            if values:
                axes.plot(curve.progress, values, "o-", color=f"C{index}", markersize=3, linewidth=1, label=name)
        axes.set_xlabel("share of training")
        axes.set_ylabel(f"{'correlation' if kind == 'pearson' else kind} of register maps")
        if axes.lines:
            axes.legend(fontsize=7)
    return figure
