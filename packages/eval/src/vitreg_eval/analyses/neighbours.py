"""How much patches resemble their four neighbours, outliers apart (registers paper, figure 5a; study, figure 6).

The paper looks at patch embeddings before positions are added: patches that become outliers are more like their
neighbours there, as plain background is. In the output they are less like them. Both can be read off here.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter1d
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

from vitreg_eval.analyses.kinds import NORMAL_COLOUR
from vitreg_eval.analyses.panels import OUTLIER_COLOUR, panels

BINS = 100
SMOOTHING = 1.5
"""Standard deviation of the kernel of a drawn density, in bins."""


@dataclass(frozen=True)
class NeighbourSimilarity:
    """Cosines of directed pairs (patch, neighbour), each under the kind of the patch."""

    normal_median: float | None
    """Median cosine of the pairs of normal patches; None without such pairs."""
    outlier_median: float | None
    """The same of outliers."""
    normal_pairs: int
    outlier_pairs: int
    auroc: float | None
    """Chance that the pair of an outlier is more alike than that of a normal patch, ties half: .5 when nothing differs,
    above when outliers are more alike; None where a kind has no pairs."""
    edges: Float[np.ndarray, " edges"]
    """Of the bins, from -1 to 1."""
    normal_counts: Float[np.ndarray, " bins"]
    """Pairs of normal patches in each bin."""
    outlier_counts: Float[np.ndarray, " bins"]
    """Pairs of outliers in each bin."""


def neighbour_similarity(tokens: Float[Tensor, "b p d"], grid: tuple[int, int]) -> Float32[Tensor, "b p 4"]:
    """Cosine of every patch with the patches above, below, left and right of it; not a number where there is none.

    Args:
        tokens: patch embeddings before positions, or tokens of any block. A token of length 0 has cosine 0 with all.
        grid: rows and columns of patches.

    Returns:
        Cosines from -1 to 1, in the order above, below, left, right.
    """
    unit = rearrange(
        F.normalize(tokens.float(), dim=-1), "b (rows cols) d -> b rows cols d", rows=grid[0], cols=grid[1]
    )
    vertical = (unit[:, 1:] * unit[:, :-1]).sum(dim=-1).clamp(-1, 1)
    horizontal = (unit[:, :, 1:] * unit[:, :, :-1]).sum(dim=-1).clamp(-1, 1)
    similarity = unit.new_full((*unit.shape[:3], 4), torch.nan)
    similarity[:, 1:, :, 0] = vertical
    similarity[:, :-1, :, 1] = vertical
    similarity[:, :, 1:, 2] = horizontal
    similarity[:, :, :-1, 3] = horizontal
    return rearrange(similarity, "b rows cols sides -> b (rows cols) sides")


def similarity_by_kind(similarity: Float[Tensor, "b p 4"], outliers: Bool[Tensor, "b p"]) -> NeighbourSimilarity:
    """Compare the pairs of outliers with those of normal patches.

    Args:
        similarity: from `neighbour_similarity`; values that are not numbers are no pairs.
        outliers: patches whose output token is an outlier.
    """
    normal, outlier = (pairs_of(similarity, chosen) for chosen in (~outliers, outliers))
    edges = np.linspace(-1, 1, BINS + 1)
    return NeighbourSimilarity(
        normal_median=median(normal),
        outlier_median=median(outlier),
        normal_pairs=len(normal),
        outlier_pairs=len(outlier),
        auroc=auroc(outlier, normal),
        edges=edges,
        normal_counts=np.histogram(normal, edges)[0].astype(float),
        outlier_counts=np.histogram(outlier, edges)[0].astype(float),
    )


def pairs_of(similarity: Float[Tensor, "b p 4"], chosen: Bool[Tensor, "b p"]) -> Float[np.ndarray, " pairs"]:
    """Cosines of the pairs that start at the chosen patches."""
    cosines = similarity[chosen].flatten().cpu().numpy()
    return cosines[~np.isnan(cosines)]


def median(values: Float[np.ndarray, " n"]) -> float | None:
    """Median, or None of nothing."""
    return float(np.median(values)) if len(values) else None


def auroc(positive: Float[np.ndarray, " n"], negative: Float[np.ndarray, " m"]) -> float | None:
    """Chance that a positive is above a negative, ties counting half (Mann and Whitney 1947); None without a pair."""
    n, m = len(positive), len(negative)
    if not n or not m:
        return None
    ranks = rankdata(np.concatenate([positive, negative]))[:n]
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


def plot_neighbour_similarity(found: dict[str, NeighbourSimilarity]) -> Figure:
    """Density of the cosines of normal patches and of outliers, one panel for each named kind of token."""
    figure, grid = panels(1, len(found), width=4.2, height=2.8)
    for axes, (name, one) in zip(grid[0], found.items(), strict=True):
        draw_density(axes, one, one.normal_counts, f"normal, median {spell(one.normal_median)}", NORMAL_COLOUR)
        draw_density(axes, one, one.outlier_counts, f"outlier, median {spell(one.outlier_median)}", OUTLIER_COLOUR)
        axes.set_title(f"{name}: AUROC {spell(one.auroc)}", fontsize=9)
        axes.set_xlabel("cosine with a neighbour")
        axes.set_xlim(-1, 1)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7, loc="upper left")
    grid[0, 0].set_ylabel("density")
    return figure


def draw_density(
    axes: Axes, found: NeighbourSimilarity, counts: Float[np.ndarray, " bins"], label: str, colour: str
) -> None:
    """A histogram of area 1, and the same smoothed."""
    if not counts.any():
        return
    density = counts / counts.sum() / np.diff(found.edges)
    axes.stairs(density, found.edges, fill=True, alpha=0.25, color=colour)
    centres = (found.edges[1:] + found.edges[:-1]) / 2
    axes.plot(centres, gaussian_filter1d(density, SMOOTHING, mode="reflect"), color=colour, label=label)


def spell(value: float | None) -> str:
    """A number for a legend."""
    return "none" if value is None else f"{value:.2f}"
