"""Do busy or plain pictures show more artifacts? Artifact score of an image against its complexity."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.analyses.kinds import NORMAL_COLOUR
from vitreg_eval.analyses.panels import panels
from vitreg_eval.metrics import Metric, measure

EDGE = 0.1
"""Change of brightness per pixel from which a pixel lies on an edge; black to white is 1."""
JPEG_QUALITY = 75
Measure = Literal["edge_density", "png_bits", "jpeg_bits"]
LABELS: dict[Measure, str] = {
    "edge_density": "share of edge pixels",
    "png_bits": "PNG, bits per pixel",
    "jpeg_bits": f"JPEG at quality {JPEG_QUALITY}, bits per pixel",
}


@dataclass(frozen=True)
class Complexity:
    """How busy one picture is; measure what the model sees, resized and cropped."""

    edge_density: float
    """Part of the pixels whose gradient of brightness is at least `EDGE`, 0 to 1."""
    png_bits: float
    """Bits per pixel as PNG: no loss, so noise counts in full."""
    jpeg_bits: float
    """Bits per pixel as JPEG."""


@dataclass(frozen=True)
class ArtifactScores:
    """How strong the artifacts of each image are."""

    outliers: Float[Tensor, " b"]
    """Number of outlier patches."""
    max_over_median: Float[Tensor, " b"]
    """Largest patch norm over the median one."""


@dataclass(frozen=True)
class ComplexityRelation:
    """Rank correlation of an artifact score with one measure of complexity."""

    measure: Measure
    complexity: Float[np.ndarray, " b"]
    scores: Float[np.ndarray, " b"]
    spearman: Metric | None
    """Spearman's coefficient, -1 to 1, with its interval over images; None where one of both never changes."""


def picture_complexity(picture: UInt8[np.ndarray, "height width 3"]) -> Complexity:
    """Edge density and compressed sizes of an 8-bit picture of at least 2 x 2 pixels."""
    height, width, _ = picture.shape
    luma = picture @ np.array([0.299, 0.587, 0.114]) / 255  # ITU-R BT.601
    down, right = np.gradient(luma)
    image = Image.fromarray(picture)
    return Complexity(
        edge_density=float((np.hypot(down, right) >= EDGE).mean()),
        png_bits=8 * encoded_size(image, "PNG") / (height * width),
        jpeg_bits=8 * encoded_size(image, "JPEG") / (height * width),
    )


def encoded_size(image: Image.Image, layout: Literal["PNG", "JPEG"]) -> int:
    """Bytes of the encoded picture."""
    buffer = BytesIO()
    if layout == "PNG":
        image.save(buffer, layout)
    else:
        image.save(buffer, layout, quality=JPEG_QUALITY)
    return buffer.tell()


def artifact_scores(norms: Float[Tensor, "b p"], outliers: Bool[Tensor, "b p"]) -> ArtifactScores:
    """Both scores of every image, from the norms before the final norm and the outlier mask."""
    values = norms.double().cpu()
    return ArtifactScores(outliers.sum(dim=1).double().cpu(), values.max(dim=1).values / values.quantile(0.5, dim=1))


def relate_to_complexity(
    scores: Float[Tensor, " b"], pictures: Sequence[Complexity], *, seed: int = 0
) -> list[ComplexityRelation]:
    """Rank correlation of the scores with each measure of complexity.

    Args:
        scores: one of `ArtifactScores`.
        pictures: complexity of the same images, in order.
        seed: of the bootstrap over images.

    Raises:
        InputError: not one picture for every score.
    """
    if len(scores) != len(pictures):
        raise InputError(f"{len(scores)} scores and {len(pictures)} pictures; give one picture for every score")
    return [relate(scores, pictures, name, seed) for name in LABELS]


def relate(scores: Float[Tensor, " b"], pictures: Sequence[Complexity], name: Measure, seed: int) -> ComplexityRelation:
    """Rank correlation with one measure."""
    values = torch.tensor([getattr(picture, name) for picture in pictures], dtype=torch.float64)
    pairs = torch.stack([scores.double().cpu(), values], dim=1)
    changes = len(pairs) > 1 and bool((pairs != pairs[:1]).any(dim=0).all())
    found = measure(pairs, spearman, seed=seed) if changes else None
    return ComplexityRelation(name, values.numpy(), pairs[:, 0].numpy(), found)


def spearman(pairs: Float[Tensor, "n 2"], counts: Float[Tensor, "repeats n"]) -> Float[Tensor, " repeats"]:
    """Spearman's coefficient on the images drawn: Pearson's of the ranks; not a number where a column is constant."""
    shares = counts / counts.sum(dim=1, keepdim=True)
    first, second = (centred_ranks(column, counts) for column in pairs.unbind(dim=1))
    variances = (shares * first.square()).sum(dim=1) * (shares * second.square()).sum(dim=1)
    return (shares * first * second).sum(dim=1) / variances.sqrt()


def centred_ranks(values: Float[Tensor, " n"], counts: Float[Tensor, "repeats n"]) -> Float[Tensor, "repeats n"]:
    """Rank of each image among those drawn, less the mean rank; ties share theirs, and so do draws of one image."""
    _, group = values.unique(return_inverse=True)
    sizes = counts.new_zeros(len(counts), int(group.max()) + 1).index_add_(1, group, counts)
    ranks = sizes.cumsum(dim=1) - (sizes - 1) / 2
    return ranks[:, group] - (counts.sum(dim=1, keepdim=True) + 1) / 2


def plot_complexity(found: Sequence[ComplexityRelation], label: str) -> Figure:
    """A scatter of the images for each measure of complexity.

    Args:
        found: from `relate_to_complexity`.
        label: what the score is, with its unit.
    """
    figure, grid = panels(1, len(found), width=3.0, height=2.8)
    for axes, one in zip(grid[0], found, strict=True):
        draw_relation(axes, one)
    grid[0, 0].set_ylabel(label)
    return figure


def draw_relation(axes: Axes, one: ComplexityRelation) -> None:
    """One scatter with its coefficient."""
    axes.scatter(one.complexity, one.scores, s=6, alpha=0.5, color=NORMAL_COLOUR, linewidths=0)
    axes.set_xlabel(LABELS[one.measure])
    if one.spearman is None:
        axes.set_title("no rank correlation: constant", fontsize=8)
        return
    interval = "" if one.spearman.ci95 is None else " ({:.2f} to {:.2f})".format(*one.spearman.ci95)
    axes.set_title(f"Spearman {one.spearman.value:.2f}{interval}", fontsize=8)
