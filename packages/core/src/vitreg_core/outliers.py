"""Outlier tokens: patches whose norm forms a second, far higher mode; found without a cutoff chosen by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from vitreg_core.config import Config
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone

BINS = 1024
STD_FLOOR = 0.02
EM_STEPS = 400
EM_TOLERANCE = 1e-7  # nats per token
MIXTURE_TOKENS = 3000
MIXTURE_IMAGES = 16
SMALL_SAMPLE_STDS = 5.0


class OutlierRule(Config):
    """When a second mode of the log norms counts as one; dimensionless, the same for every model."""

    bic_gain: PositiveFloat = 10.0
    """How far two or three Gaussians must beat one in the Bayesian information criterion."""
    separation: PositiveFloat = 2.0
    """Least distance of the two groups, as Ashman's D."""
    ratio: float = Field(default=1.5, gt=1.0)
    """Least typical norm of the outliers over that of the other patches."""
    share: tuple[PositiveFloat, PositiveFloat] = (2e-4, 0.5)
    """Smallest and largest share of the tokens that can be outliers."""
    count: PositiveInt = 8
    """Least number of outlier tokens."""


@dataclass(frozen=True)
class Evidence:
    """Simpler statistics of the same norms: to compare with other work, not to decide."""

    valley: float
    """Density of log norms in the valley above the bulk over that of the peak behind it; below .35 is clear, 1 none."""
    mad5_count: int
    """Tokens above the median + 5 median absolute deviations of their image."""
    mad5_share: float
    """The same over all tokens, 0 to 1."""
    percentile_98: float
    """98th percentile of the norms."""
    max_over_median: float
    """Largest norm over the median norm."""
    kurtosis: float
    """Excess kurtosis of the image-centred log norms; 0 for a normal law."""


@dataclass(frozen=True)
class Outliers:
    """Which patch tokens of one layer are outliers, and how sure that is."""

    mask: Bool[Tensor, "images p"]
    """True for outlier tokens; all False when none were found."""
    found: bool
    """The verdict: is there an outlier mode?"""
    rule: Literal["mixture", "small-sample"]
    """Which rule gave the verdict; the second one where there were too few tokens to fit a mixture."""
    cut: float | None
    """Log of a norm over the median norm of its image, above which a token is an outlier; None when none were found."""
    cutoff: float | None
    """Norm above which a token of a typical image is an outlier; None when none were found."""
    fraction: float
    """Share of the patch tokens that are outliers, 0 to 1."""
    image_fraction: float
    """Share of the images with at least one outlier, 0 to 1."""
    median_norm: float
    """Median norm of all patch tokens."""
    max_norm: float
    """Largest norm."""
    ratio: float | None
    """Typical (geometric mean) norm of the outliers over that of the others; None when none were found."""
    separation: float | None
    """Ashman's D between the two groups, above 2 when apart; None when not found or where no mixture was fitted."""
    evidence: Evidence
    """Simpler statistics of the same norms."""


@dataclass(frozen=True)
class Histogram:
    """Image-centred log norms in bins; empty bins are left out."""

    points: Float64[np.ndarray, " bins"]
    """Mean of the tokens in each bin."""
    counts: Float64[np.ndarray, " bins"]
    """Tokens in each bin."""


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians, in order of their means."""

    weights: Float64[np.ndarray, " components"]
    means: Float64[np.ndarray, " components"]
    stds: Float64[np.ndarray, " components"]
    log_likelihood: float = 0.0

    def bic(self, tokens: int) -> float:
        """Bayesian information criterion; lower is better."""
        return float((3 * len(self.means) - 1) * np.log(tokens) - 2 * self.log_likelihood)

    def log_joint(self, points: Float64[np.ndarray, " bins"]) -> Float64[np.ndarray, "components bins"]:
        """Log of weight times density of each component."""
        scores = (points - self.means[:, None]) / self.stds[:, None]
        scales = np.log(np.maximum(self.weights, 1e-300)) - np.log(self.stds) - 0.5 * np.log(2 * np.pi)
        return scales[:, None] - 0.5 * scores * scores

    def part(self, components: slice) -> "Mixture":
        """Some of the components, with the weights they have here."""
        return Mixture(self.weights[components], self.means[components], self.stds[components])

    def moments(self) -> tuple[float, float, float]:
        """Total weight, mean and standard deviation of the mixture as one group."""
        weight = self.weights.sum()
        mean = self.weights @ self.means / weight
        variance = self.weights @ (self.stds**2 + (self.means - mean) ** 2) / weight
        return float(weight), float(mean), float(np.sqrt(variance))


@dataclass(frozen=True)
class Split:
    """A mixture cut in two groups: the bulk of the tokens and the outliers above it."""

    bulk: Mixture
    outliers: Mixture

    @property
    def share(self) -> float:
        """Weight of the outliers."""
        return self.outliers.moments()[0]

    @property
    def ratio(self) -> float:
        """Geometric mean norm of the outliers over that of the bulk."""
        return float(np.exp(self.outliers.moments()[1] - self.bulk.moments()[1]))

    @property
    def separation(self) -> float:
        """Ashman's D: distance of the means over the root mean square of the standard deviations."""
        _, low, low_std = self.bulk.moments()
        _, high, high_std = self.outliers.moments()
        return float(np.sqrt(2) * (high - low) / np.hypot(low_std, high_std))

    @property
    def cut(self) -> float | None:
        """Last log norm between the two means where the bulk is still denser; None if it is at the outliers' mean."""
        points = np.linspace(self.bulk.moments()[1], self.outliers.moments()[1], BINS)
        bulk, outliers = (np.logaddexp.reduce(group.log_joint(points)) for group in (self.bulk, self.outliers))
        denser = np.flatnonzero(bulk > outliers)
        last = denser[-1] if len(denser) else 0
        return float(points[last]) if last < BINS - 1 else None


def patch_norms(backbone: Backbone, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "depth b p"]:
    """L2 norms of the patch tokens in the residual stream after every block, before the final norm, in float32.

    The final norm hides outliers: it gives every token about the same length.

    Args:
        backbone: Any model; its blocks count from 0.
        images: Normalised pixels.
    """
    with torch.no_grad():
        layers = backbone.intermediate(images, range(backbone.depth), norm=False)
        return torch.stack([torch.linalg.vector_norm(layer.patches.float(), dim=-1) for layer in layers])


def emergence_block(verdicts: Sequence[bool]) -> int | None:
    """First index whose verdict is positive together with the next one; None when there is none.

    A lone positive, the last one included, counts as chance: nothing after it confirms it.

    Args:
        verdicts: `Outliers.found` after each block, or at each training step. Blocks count from 0.
    """
    return next((i for i, pair in enumerate(pairwise(verdicts)) if all(pair)), None)


def find_outliers(norms: Float[Tensor, "images p"], *, rule: OutlierRule | None = None) -> Outliers:
    """Decide whether some patch tokens form an outlier mode, and which.

    Registers paper, section 2.1, calls a DINOv2-g token an outlier above a norm of 150; no such number fits two models.
    Our rule centres the log norms of every image on their median, fits mixtures of one to three Gaussians, and accepts
    the widest split that passes every gate of `rule` and whose upper group is the denser one at its own mean: so
    scaling all features, or one image, changes nothing. A heavy tail is no mode; where a skewed bulk has outliers
    behind its tail they are all found, but the mask takes in the end of the tail.

    With fewer than 16 images or 3,000 tokens, too few for a mixture, an outlier is a token above 1.5 times the median
    of its image and above 5 standard deviations of the log norms, taken from their lower half: that finds all outliers
    at 6 times the median and more, about half at 3 times.

    Args:
        norms: L2 norms of one layer's patch tokens before the final norm, above 0, from `patch_norms`; tokens that make
            up less than .1 % need 256 images.
        rule: The five constants; not to be tuned per model.

    Raises:
        InputError: no norms, or zero, negative or non-finite ones.
    """
    rule = rule or OutlierRule()
    values = checked(norms)
    logs = np.log(values)
    medians = np.median(logs, axis=1, keepdims=True)
    centred = logs - medians
    histogram = make_histogram(centred)
    if len(values) >= MIXTURE_IMAGES and values.size >= MIXTURE_TOKENS:
        name: Literal["mixture", "small-sample"] = "mixture"
        split = best_split(histogram, lower_std(centred), rule)
        cut = split.cut if split else None
        ratio, separation = (split.ratio, split.separation) if split else (None, None)
    else:
        name, separation = "small-sample", None
        cut, ratio = small_sample_cut(centred, rule)
    mask = centred > (np.inf if cut is None else cut)
    return Outliers(
        mask=torch.from_numpy(mask).to(norms.device),
        found=cut is not None,
        rule=name,
        cut=cut,
        cutoff=None if cut is None else float(np.exp(cut + np.median(medians))),
        fraction=float(mask.mean()),
        image_fraction=float(mask.any(axis=1).mean()),
        median_norm=float(np.median(values)),
        max_norm=float(values.max()),
        ratio=ratio,
        separation=separation,
        evidence=gather_evidence(values, centred, histogram, rule),
    )


def mark_outliers(norms: Float[Tensor, "images p"], cut: float | None) -> Bool[Tensor, "images p"]:
    """Which tokens of any images are outliers by a verdict that was found on some of them.

    Args:
        norms: as for `find_outliers`.
        cut: `Outliers.cut`; None marks nothing.

    Raises:
        InputError: as `find_outliers`.
    """
    logs = np.log(checked(norms))
    centred = logs - np.median(logs, axis=1, keepdims=True)
    return torch.from_numpy(centred > (np.inf if cut is None else cut)).to(norms.device)


def checked(norms: Float[Tensor, "images p"]) -> Float64[np.ndarray, "images p"]:
    """Norms in double precision, all of them usable."""
    values = norms.detach().cpu().double().numpy()
    if values.size == 0:
        raise InputError(f"norms of shape {tuple(norms.shape)}: no patch tokens; give at least one image")
    bad = values.size - int((np.isfinite(values) & (values > 0)).sum())
    if bad:
        raise InputError(
            f"{bad} of {values.size} patch norms are zero, negative or not finite; "
            "look for a diverged model or blank features, and take the norms in float32 before the final norm"
        )
    return values


def make_histogram(centred: Float64[np.ndarray, "images p"]) -> Histogram:
    """Count log norms in equal bins from the smallest to the largest."""
    low, span = centred.min(), np.ptp(centred)
    index = ((centred.ravel() - low) * (BINS / max(span, 1e-12))).astype(np.int64).clip(max=BINS - 1)
    counts = np.bincount(index, minlength=BINS).astype(np.float64)
    sums = np.bincount(index, weights=centred.ravel(), minlength=BINS)
    filled = counts > 0
    return Histogram(sums[filled] / counts[filled], counts[filled])


def lower_std(centred: Float64[np.ndarray, "images p"]) -> float:
    """Standard deviation of the bulk, from its lower half alone so that outliers cannot inflate it."""
    low, median = np.percentile(centred, [15.9, 50])
    return max(float(median - low), STD_FLOOR)


def small_sample_cut(
    centred: Float64[np.ndarray, "images p"], rule: OutlierRule
) -> tuple[float, float] | tuple[None, None]:
    """Cut and ratio where there are too few tokens for a mixture."""
    cut = max(SMALL_SAMPLE_STDS * lower_std(centred), float(np.log(rule.ratio)))
    high = centred > cut
    if not high.any():
        return None, None
    return cut, float(np.exp(centred[high].mean() - centred[~high].mean()))


def best_split(histogram: Histogram, std: float, rule: OutlierRule) -> Split | None:
    """Widest split that passes every gate, of the mixtures that beat each one with fewer components."""
    tokens = int(histogram.counts.sum())
    lowest = fit(histogram, [[]], rule).bic(tokens)
    splits: list[Split] = []
    for starts in starting_cuts(std):
        mixture = fit(histogram, starts, rule)
        if lowest - mixture.bic(tokens) > rule.bic_gain:
            cuts = range(1, len(mixture.means))
            splits += [Split(mixture.part(slice(0, cut)), mixture.part(slice(cut, None))) for cut in cuts]
        lowest = min(lowest, mixture.bic(tokens))
    return max((s for s in splits if accepted(s, tokens, rule)), key=lambda s: s.separation, default=None)


def accepted(split: Split, tokens: int, rule: OutlierRule) -> bool:
    """Whether a split passes every gate."""
    return (
        rule.share[0] < split.share < rule.share[1]
        and split.share * tokens >= rule.count
        and split.ratio >= rule.ratio
        and split.separation > rule.separation
        and split.cut is not None
    )


def starting_cuts(std: float) -> list[list[list[float]]]:
    """Where to cut the log norms to start a fit: for two and for three components, by the tail and symmetric."""
    return [[[3 * std], [0.0]], [[0.0, 3 * std], [3 * std, 6 * std], [-std, std]]]


def fit(histogram: Histogram, starts: list[list[float]], rule: OutlierRule) -> Mixture:
    """Mixture of highest likelihood among those the starts lead to."""
    fits = [expectation_maximisation(histogram, cuts, rule.share[0]) for cuts in starts]
    best = max(fits, key=lambda mixture: mixture.log_likelihood)
    order = np.argsort(best.means)
    return Mixture(best.weights[order], best.means[order], best.stds[order], best.log_likelihood)


def expectation_maximisation(histogram: Histogram, cuts: list[float], background: float) -> Mixture:
    """Fit a Gaussian per piece between the cuts, then all together until the likelihood stays.

    A uniform background of fixed weight owns the stray tokens: a few far out cannot drag a Gaussian along.
    """
    points, counts = histogram.points, histogram.counts
    powers = np.stack([counts, counts * points, counts * points**2], axis=1)
    pieces = np.searchsorted(np.array(cuts), points)
    shares = (pieces == np.arange(len(cuts) + 1)[:, None]).astype(np.float64)
    stray = np.log(background / max(np.ptp(points), STD_FLOOR))
    previous = -np.inf
    for _ in range(EM_STEPS):
        mixture = maximise(shares, powers)
        joint = mixture.log_joint(points) + np.log1p(-background)
        top = np.maximum(joint.max(axis=0), stray)
        shares = np.exp(joint - top)
        total = shares.sum(axis=0) + np.exp(stray - top)
        shares /= total
        likelihood = float(counts @ (np.log(total) + top))
        if abs(likelihood - previous) < EM_TOLERANCE * counts.sum():
            break
        previous = likelihood
    return Mixture(mixture.weights, mixture.means, mixture.stds, likelihood)


def maximise(shares: Float64[np.ndarray, "components bins"], powers: Float64[np.ndarray, "bins 3"]) -> Mixture:
    """Weights, means and standard deviations of components that own these shares of the bins."""
    count, total, squares = (shares @ powers).T
    count = np.maximum(count, 1e-12)
    means = total / count
    stds = np.sqrt(np.maximum(squares / count - means**2, STD_FLOOR**2))
    return Mixture(count / count.sum(), means, stds)


def gather_evidence(
    values: Float64[np.ndarray, "images p"],
    centred: Float64[np.ndarray, "images p"],
    histogram: Histogram,
    rule: OutlierRule,
) -> Evidence:
    """Collect the simpler statistics."""
    medians = np.median(values, axis=1, keepdims=True)
    deviations = np.median(np.abs(values - medians), axis=1, keepdims=True)
    above = int((values > medians + 5 * deviations).sum())
    squares = (centred - centred.mean()) ** 2
    return Evidence(
        valley=find_valley(histogram, lower_std(centred), rule),
        mad5_count=above,
        mad5_share=above / values.size,
        percentile_98=float(np.percentile(values, 98)),
        max_over_median=float(values.max() / np.median(values)),
        kurtosis=float((squares**2).mean() / max(squares.mean() ** 2, 1e-24) - 3) if squares.any() else 0.0,
    )


def find_valley(histogram: Histogram, std: float, rule: OutlierRule) -> float:
    """Smallest ratio of valley to peak above the main peak, smoothed by half a standard deviation of the bulk.

    A peak counts with as many tokens under the kernel as tell it from chance: twice the count of the rule.
    """
    grid = np.linspace(histogram.points[0], histogram.points[-1], 256)
    width = max(std / 2, 2 * (grid[1] - grid[0]))
    density = np.exp(-0.5 * ((grid[:, None] - histogram.points) / width) ** 2) @ histogram.counts
    above = density[density.argmax() :]
    ratios = np.minimum.accumulate(above) / np.maximum(above, 1e-300)
    return float(ratios[above >= 2 * rule.count].min(initial=1.0))
