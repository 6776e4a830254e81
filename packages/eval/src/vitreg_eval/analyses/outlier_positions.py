"""Where in the picture outliers sit, against what chance alone would draw (registers paper, figure 10)."""

from dataclasses import dataclass

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.analyses.panels import OUTLIER_COLOUR, panels, show_image

DRAWS = 1000
TOP = 5
Interval = tuple[float, float]


@dataclass(frozen=True)
class Concentration:
    """How unevenly shares are spread over the positions."""

    top_share: float
    """Part of all outliers at the five positions that have most, 0 to 1."""
    gini: float
    """Gini coefficient of the shares: 0 when even, towards 1 when a single position has them all."""
    stripes: float
    """Standard deviation of the column means over that of the row means: above 1 for vertical stripes, infinite when
    all rows are the same, 1 when rows and columns are both the same."""


@dataclass(frozen=True)
class OutlierPositions:
    """The map of positions, and each number with the middle 95 % of what chance draws.

    Chance: every image keeps its number of outliers and places them anywhere. A sparse map looks concentrated by chance
    alone, so read each number beside its interval.
    """

    share: Float[np.ndarray, "rows cols"]
    """Part of the images with an outlier at a position, 0 to 1."""
    rings: Float[np.ndarray, " rings"]
    """Mean share of the positions at a distance from the border, in patches; 0 is the border itself."""
    rings_by_chance: Float[np.ndarray, "rings 2"]
    """Lower and upper end for each ring."""
    concentration: Concentration
    top_share_by_chance: Interval
    gini_by_chance: Interval
    stripes_by_chance: Interval
    images: int
    outliers: int


def outlier_positions(
    outliers: Bool[Tensor, "b p"], grid: tuple[int, int], *, seed: int = 0, draws: int = DRAWS
) -> OutlierPositions:
    """Share of images with an outlier at each position, its profile towards the border and its unevenness.

    Args:
        outliers: which patches are outliers; all images have the same grid.
        grid: rows and columns of patches.
        seed: of the draws.
        draws: maps drawn by chance.

    Raises:
        InputError: no outlier in any image.
    """
    mask = rearrange(outliers.cpu().numpy(), "b (rows cols) -> b rows cols", rows=grid[0], cols=grid[1])
    if not mask.any():
        raise InputError(
            f"no outliers in {len(mask)} images, so they have no positions; give a model that has outliers"
        )
    share = mask.mean(axis=0)
    per_image = mask.sum(axis=(1, 2))
    chance = draw_maps(per_image, grid, np.random.default_rng(seed), draws) / len(mask)
    drawn = [concentration(one) for one in chance]
    return OutlierPositions(
        share=share,
        rings=ring_profile(share),
        rings_by_chance=np.quantile([ring_profile(one) for one in chance], [0.025, 0.975], axis=0).T,
        concentration=concentration(share),
        top_share_by_chance=middle([one.top_share for one in drawn]),
        gini_by_chance=middle([one.gini for one in drawn]),
        stripes_by_chance=middle([one.stripes for one in drawn]),
        images=len(mask),
        outliers=int(per_image.sum()),
    )


def border_distance(grid: tuple[int, int]) -> Int[np.ndarray, "rows cols"]:
    """Patches between each position and the nearest border."""
    rows, cols = (np.minimum(np.arange(side), np.arange(side)[::-1]) for side in grid)
    return np.minimum(rows[:, None], cols)


def ring_profile(share: Float[np.ndarray, "rows cols"]) -> Float[np.ndarray, " rings"]:
    """Mean of a map at each distance from the border."""
    rows, cols = share.shape
    distance = border_distance((rows, cols)).ravel()
    return np.bincount(distance, weights=share.ravel()) / np.bincount(distance)


def concentration(share: Float[np.ndarray, "rows cols"]) -> Concentration:
    """Unevenness of a map that is not empty."""
    largest = np.sort(share.ravel())[::-1]
    across, down = float(share.mean(axis=0).std()), float(share.mean(axis=1).std())
    flat = 1e-12 * float(share.max())  # rounding of the means
    stripes = 1.0 if max(across, down) <= flat else np.inf if down <= flat else across / down
    return Concentration(float(largest[:TOP].sum() / largest.sum()), gini(largest), stripes)


def gini(values: Float[np.ndarray, " n"]) -> float:
    """Gini coefficient: half the mean absolute difference over the mean."""
    ordered = np.sort(values)
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))


def middle(values: list[float]) -> Interval:
    """Ends of the middle 95 % of drawn numbers; the nearest one, since an infinite one has no mean with another."""
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return float(low), float(high)


def draw_maps(
    per_image: Int[np.ndarray, " b"], grid: tuple[int, int], generator: np.random.Generator, draws: int
) -> Int[np.ndarray, "draws rows cols"]:
    """Counts per position when every image places its outliers at random, no two at one position.

    Positions are filled one after another: of the images with k left to place on m positions that remain, a binomial
    number with chance k / m uses the next one. This is exact and takes no longer for more images.
    """
    positions = grid[0] * grid[1]
    left = np.arange(per_image.max() + 1)
    images = np.tile(np.bincount(per_image), (draws, 1))  # draws, images by how many outliers they have left
    counts = np.empty((draws, positions), dtype=np.int64)
    for position in range(positions):
        used = generator.binomial(images, np.minimum(left / (positions - position), 1.0))
        images -= used
        images[:, :-1] += used[:, 1:]
        counts[:, position] = used.sum(axis=1)
    return counts.reshape(draws, *grid)


def plot_outlier_positions(found: OutlierPositions) -> Figure:
    """The map in per cent of the images, and the profile towards the border with what chance would draw."""
    figure, grid = panels(1, 2, width=4.0, height=3.2)
    show_image(grid[0, 0], 100 * found.share, f"{found.outliers:,} outliers in {found.images:,} images")
    grid[0, 0].images[0].set(cmap="magma", clim=(0, 100 * found.share.max()))
    figure.colorbar(grid[0, 0].images[0], ax=grid[0, 0], label="images with an outlier here, %")
    rings = np.arange(len(found.rings))
    low, high = 100 * found.rings_by_chance.T
    grid[0, 1].fill_between(rings, low, high, color="lightgray", label="95 % of chance")
    grid[0, 1].plot(rings, 100 * found.rings, "o-", color=OUTLIER_COLOUR, label="measured")
    grid[0, 1].set_xlabel("distance from the border, patches")
    grid[0, 1].set_ylabel("positions with an outlier, %")
    grid[0, 1].set_xticks(rings)
    grid[0, 1].set_ylim(bottom=0)
    grid[0, 1].legend(fontsize=7)
    grid[0, 1].set_title(describe(found), fontsize=8)
    return figure


def describe(found: OutlierPositions) -> str:
    """The three numbers of unevenness with their intervals by chance."""
    values = found.concentration
    rows = (
        ("top-5 share", values.top_share, found.top_share_by_chance),
        ("Gini", values.gini, found.gini_by_chance),
        ("columns / rows", values.stripes, found.stripes_by_chance),
    )
    return "\n".join(f"{name} {value:.2f} (chance {low:.2f} to {high:.2f})" for name, value, (low, high) in rows)
