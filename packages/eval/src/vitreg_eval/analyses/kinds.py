"""Means over the normal and over the outlier patches of a set of images, with intervals over the images."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from matplotlib.axes import Axes
from torch import Tensor

from vitreg_eval.analyses.panels import OUTLIER_COLOUR
from vitreg_eval.metrics import Metric, measure

NORMAL_COLOUR = "#1f77b4"


@dataclass(frozen=True)
class KindMean:
    """Mean of one value per token over the tokens of a kind."""

    metric: Metric
    """The mean over all tokens of the kind; its n are the images that have one, which the interval is drawn over."""
    tokens: int
    """How many tokens it is a mean of."""


@dataclass(frozen=True)
class ByKind:
    """The same mean over normal patches and over outliers; None where there are no such patches."""

    normal: KindMean | None
    outlier: KindMean | None


def mean_by_kind(values: Shaped[Tensor, "b p"], outliers: Bool[Tensor, "b p"], *, seed: int = 0) -> ByKind:
    """Mean of a value per patch over normal patches and over outliers.

    Args:
        values: one number per patch.
        outliers: which patches are outliers.
        seed: of the bootstrap over images.
    """
    return ByKind(kind_mean(values, ~outliers, seed=seed), kind_mean(values, outliers, seed=seed))


def kind_mean(values: Shaped[Tensor, "b p"], chosen: Bool[Tensor, "b p"], *, seed: int = 0) -> KindMean | None:
    """Mean over the chosen patches; None where none is chosen."""
    sums = sums_and_counts(values, chosen)
    there = sums[:, 1] > 0
    if not there.any():
        return None
    return KindMean(measure(sums[there], pooled_mean, seed=seed), int(chosen.sum()))


def ratio_of_kinds(values: Shaped[Tensor, "b p"], outliers: Bool[Tensor, "b p"], *, seed: int = 0) -> Metric | None:
    """Mean over the outliers over the mean over normal patches, on the images that have both; None without any."""
    high, low = (sums_and_counts(values, chosen) for chosen in (outliers, ~outliers))
    both = (high[:, 1] > 0) & (low[:, 1] > 0)
    return measure(torch.cat([high, low], dim=1)[both], pooled_ratio, seed=seed) if both.any() else None


def sums_and_counts(values: Shaped[Tensor, "b p"], chosen: Bool[Tensor, "b p"]) -> Float[Tensor, "b 2"]:
    """Sum over the chosen patches of each image, and how many they are."""
    sums = values.double().where(chosen, 0.0).sum(dim=1)
    return torch.stack([sums, chosen.sum(dim=1).double()], dim=1).cpu()


def pooled_mean(sums: Float[Tensor, "n 2"], counts: Float[Tensor, "repeats n"]) -> Float[Tensor, " repeats"]:
    """Mean over all tokens of the images drawn."""
    total, tokens = (counts @ sums).unbind(dim=1)
    return total / tokens


def pooled_ratio(sums: Float[Tensor, "n 4"], counts: Float[Tensor, "repeats n"]) -> Float[Tensor, " repeats"]:
    """Mean over the first kind's tokens over that of the second, on the images drawn."""
    return pooled_mean(sums[:, :2], counts) / pooled_mean(sums[:, 2:], counts)


def draw_kinds(axes: Axes, values: ByKind, label: str) -> None:
    """Two bars with their intervals."""
    pairs = (("normal", values.normal, NORMAL_COLOUR), ("outlier", values.outlier, OUTLIER_COLOUR))
    there = [(kind, mean, colour) for kind, mean, colour in pairs if mean is not None]
    for place, (_, mean, colour) in enumerate(there):
        axes.bar(place, mean.metric.value, color=colour, width=0.6)
        if mean.metric.ci95 is not None:
            axes.vlines(place, *mean.metric.ci95, color="black", linewidth=1.5)
    axes.set_xticks(range(len(there)), [f"{kind}\n{mean.tokens:,} tokens" for kind, mean, _ in there])
    axes.set_xlim(-0.6, len(there) - 0.4)
    axes.set_ylabel(label)
