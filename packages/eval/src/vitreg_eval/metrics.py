"""Scores of predictions: per image where an image has a score, as areas where only the whole set has one.

Each score that goes to result.json is a `Metric`, with a bootstrap interval over images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer, Shaped
from pydantic import Field, FiniteFloat, NonNegativeInt, model_serializer
from torch import Tensor
from vitreg_core.config import Config
from vitreg_core.errors import InputError

IGNORE = 255
"""The label of pixels that do not count."""

DRAWS_AT_ONCE = 2**22  # indices held in memory while resampling: 32 MiB

Statistic = Callable[[Any, Float[Tensor, "repeats n"]], Float[Tensor, " repeats"]]
"""From values per image and how often each image was drawn, one number per resample."""


class Metric(Config):
    """One measured number, as it stands in result.json."""

    value: FiniteFloat
    """The number, in the unit that its name states."""
    n: NonNegativeInt
    """How many images it was measured on."""
    ci95: tuple[FiniteFloat, FiniteFloat] | None = None
    """Ends of the 95 % interval over images; none for a single image, and for what is no statistic of images (a cutoff,
    a block number, a maximum)."""
    note: str = ""
    """What a reader must know of this number, such as a choice made on the data it is reported on."""
    resamples: tuple[float, ...] = Field(default=(), exclude=True, repr=False)
    """The number on each resample of the images. Same number of images and same seed are the same resamples, so that
    two models can be compared on them; kept in a file of its own."""

    @model_serializer(mode="wrap")
    def without_empty_note(self, plain: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave out a note that says nothing."""
        return {name: value for name, value in plain(self).items() if name != "note" or value}


# Boxes


def box_iou_at_least_half(box: Int[Tensor, "4"], boxes: Int[Tensor, "n 4"]) -> Bool[Tensor, " n"]:
    """Whether a box overlaps each of several with an IoU of 0.5 or more, decided in whole numbers.

    Boxes are x0, y0, x1, y1 in half-open pixels. Exactly 0.5 counts; an empty box overlaps nothing.
    """
    both = torch.cat([torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:])], dim=1)
    shared = box_area(both)
    union = box_area(box) + box_area(boxes) - shared
    return (shared > 0) & (2 * shared >= union)


def box_area(boxes: Int[Tensor, "*n 4"]) -> Int[Tensor, "*n"]:
    """Pixels in each box, 0 for one that ends before it starts."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def corloc(predicted: Int[Tensor, "b 4"], targets: Sequence[Int[Tensor, "_ 4"]]) -> Bool[Tensor, " b"]:
    """Whether each image's one box overlaps any of its objects with an IoU of 0.5 or more.

    CorLoc is the mean (Deselaers et al. 2010; LOST, Simeoni et al. 2021, section 4.1). An image without objects is a
    miss here; leave such images out where the protocol does.
    """
    pairs = zip(predicted, targets, strict=True)
    return torch.tensor([bool(box_iou_at_least_half(box, boxes).any()) for box, boxes in pairs], dtype=torch.bool)


# Classes


def top_k(logits: Float[Tensor, "b classes"], labels: Int[Tensor, " b"], k: int = 1) -> Bool[Tensor, " b"]:
    """Whether each image's label is among the k classes of highest score; of equal scores the first class wins.

    Raises:
        InputError: a score that is not a number, a label that is not a class, or k out of range.
    """
    classes = logits.shape[1]
    if not 1 <= k <= classes:
        raise InputError(f"top-{k} accuracy over {classes} classes; use k from 1 to {classes}")
    check_labels(labels, classes)
    if logits.isnan().any():
        image = int(logits.isnan().any(dim=1).nonzero()[0])
        raise InputError(f"scores of image {image} are not numbers; run the model in fp32, or check its weights")
    own = logits.gather(1, labels[:, None].long())
    earlier = torch.arange(classes, device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(dim=1) < k


def check_labels(labels: Int[Tensor, " n"], classes: int, what: str = "label") -> None:
    """Refuse values that name no class."""
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise InputError(f"{what} {int(wrong[0])} is none of the {classes} classes; they count from 0 to {classes - 1}")


def confusion_matrix(
    predicted: Integer[Tensor, "*pixels"], labels: Integer[Tensor, "*pixels"], classes: int, *, ignore: int = IGNORE
) -> Int[Tensor, "classes classes"]:
    """Count pixels by label (row) and prediction (column); pixels labelled `ignore` do not count.

    Raises:
        InputError: a label or a prediction that names no class.
    """
    counted = labels != ignore
    rows, cols = labels[counted].long(), predicted[counted].long()
    check_labels(rows, classes)
    check_labels(cols, classes, "prediction")
    return torch.bincount(rows * classes + cols, minlength=classes * classes).reshape(classes, classes)


def miou(confusion: Shaped[Tensor, "*b classes classes"]) -> Float[Tensor, "*b"]:
    """Mean IoU, 0 to 1, over the classes that occur in labels or predictions; not a number when none does."""
    return miou_of_areas(class_areas(confusion))


def class_areas(confusion: Shaped[Tensor, "*b classes classes"]) -> Float[Tensor, "*b 3 classes"]:
    """Pixels per class that are right, labelled and predicted: all that IoU needs, and additive over images."""
    exact = confusion.double()
    return torch.stack([exact.diagonal(dim1=-2, dim2=-1), exact.sum(dim=-1), exact.sum(dim=-2)], dim=-2)


def miou_of_areas(areas: Float[Tensor, "*b 3 classes"]) -> Float[Tensor, "*b"]:
    """Mean over the classes with any area; 0 / 0 of the others is left out."""
    right, labelled, predicted = areas.unbind(dim=-2)
    return (right / (labelled + predicted - right)).nanmean(dim=-1)


def pixel_accuracy(confusion: Shaped[Tensor, "*b classes classes"]) -> Float[Tensor, "*b"]:
    """Share of counted pixels whose prediction is right, 0 to 1; not a number when none counts."""
    exact = confusion.double()
    return exact.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / exact.sum(dim=(-2, -1))


# Depth


@dataclass(frozen=True)
class DepthErrors:
    """Errors of predicted depth per image; a set's score is the mean over images (Eigen et al. 2014)."""

    rmse: Float[Tensor, " b"]
    """Root of the mean squared error, metres."""
    abs_rel: Float[Tensor, " b"]
    """Mean of the error over the true depth."""
    sq_rel: Float[Tensor, " b"]
    """Mean of the squared error over the true depth, metres."""
    log10: Float[Tensor, " b"]
    """Mean difference of the decimal logarithms."""
    delta1: Float[Tensor, " b"]
    """Share of pixels less than a factor of 1.25 off, 0 to 1."""
    delta2: Float[Tensor, " b"]
    """Share less than a factor of 1.25^2 off."""
    delta3: Float[Tensor, " b"]
    """Share less than a factor of 1.25^3 off."""


def depth_errors(
    predicted: Float[Tensor, "b height width"],
    depth: Float[Tensor, "b height width"],
    *,
    minimum: float = 1e-3,
    maximum: float = 10.0,
) -> DepthErrors:
    """Compare depths in metres where the true one is strictly between minimum and maximum.

    Predictions are clamped to that range first. The defaults are those of NYU Depth v2; crop both maps before.

    Raises:
        InputError: an image without a valid pixel, or a prediction that is not a number.
    """
    valid = (depth > minimum) & (depth < maximum)
    refuse(
        ~valid.any(dim=(1, 2)), f"has no true depth between {minimum} and {maximum} m; leave it out, or check its unit"
    )
    refuse((predicted.isnan() & valid).any(dim=(1, 2)), "has predicted depths that are not numbers; run in fp32")
    truth = depth.double().where(valid, 1.0)
    guess = predicted.double().clamp(minimum, maximum).where(valid, 1.0)
    error = (guess - truth).abs()
    factor = torch.maximum(guess / truth, truth / guess)

    def average(values: Shaped[Tensor, "b height width"]) -> Float[Tensor, " b"]:
        return (values * valid).sum(dim=(1, 2)) / valid.sum(dim=(1, 2)).double()

    return DepthErrors(
        rmse=average(error.square()).sqrt(),
        abs_rel=average(error / truth),
        sq_rel=average(error.square() / truth),
        log10=average(factor.log10()),
        delta1=average(factor < 1.25),
        delta2=average(factor < 1.25**2),
        delta3=average(factor < 1.25**3),
    )


def refuse(wrong: Bool[Tensor, " b"], problem: str) -> None:
    """Name the first image with a problem."""
    if wrong.any():
        raise InputError(f"image {int(wrong.nonzero()[0])} of the batch {problem}")


# Intervals


def mean(per_image: Shaped[Tensor, " n"], counts: Float[Tensor, "repeats n"]) -> Float[Tensor, " repeats"]:
    """Mean of one value per image: accuracy, CorLoc, depth errors."""
    return counts @ per_image.double() / counts.sum(dim=1)


def pooled_miou(areas: Float[Tensor, "n 3 classes"], counts: Float[Tensor, "repeats n"]) -> Float[Tensor, " repeats"]:
    """Mean IoU over the pixels of the images drawn, from the `class_areas` of each image."""
    return miou_of_areas(torch.tensordot(counts, areas.double(), dims=1))


def pooled_pixel_accuracy(
    areas: Float[Tensor, "n 3 classes"], counts: Float[Tensor, "repeats n"]
) -> Float[Tensor, " repeats"]:
    """Pixel accuracy over the images drawn, from the `class_areas` of each image."""
    right, labelled, _ = areas.double().sum(dim=-1).unbind(dim=-1)
    return counts @ right / (counts @ labelled)


def pooled_class_accuracy(
    areas: Float[Tensor, "n 3 classes"], counts: Float[Tensor, "repeats n"]
) -> Float[Tensor, " repeats"]:
    """Share of each class's pixels that are right, over the images drawn; mean over the classes that are labelled."""
    right, labelled, _ = torch.tensordot(counts, areas.double(), dims=1).unbind(dim=-2)
    return (right / labelled).nanmean(dim=-1)


def bootstrap_ci(
    per_image: Shaped[Tensor | np.ndarray, "n *values"],
    statistic: Statistic = mean,
    *,
    seed: int = 0,
    repeats: int = 1000,
) -> tuple[float, float]:
    """Ends of the 95 % percentile interval over images drawn with replacement (Efron and Tibshirani 1993, ch. 13).

    Args:
        per_image: one value, or the areas of one image, per image.
        statistic: `mean`, `pooled_miou`, `pooled_pixel_accuracy` or `pooled_class_accuracy`.
        seed: the same seed gives the same interval.
        repeats: how many resamples.

    Raises:
        InputError: fewer than two images.
    """
    return middle(bootstrap(per_image, statistic, seed=seed, repeats=repeats))


def bootstrap(
    per_image: Shaped[Tensor | np.ndarray, "n *values"],
    statistic: Statistic = mean,
    *,
    seed: int = 0,
    repeats: int = 1000,
) -> Float[Tensor, " repeats"]:
    """The number on each resample; arguments as for `bootstrap_ci`."""
    values = torch.as_tensor(per_image).cpu()
    if len(values) < 2:
        raise InputError(f"a 95 % interval over {len(values)} images; measure at least 2")
    generator = torch.Generator().manual_seed(seed)
    most = max(1, DRAWS_AT_ONCE // len(values))
    sizes = [min(most, repeats - done) for done in range(0, repeats, most)]
    return torch.cat([statistic(values, resample(len(values), size, generator)) for size in sizes])


def middle(numbers: Float[Tensor, " repeats"]) -> tuple[float, float]:
    """Ends of the middle 95 % of the resamples; those without a number are left out."""
    low, high = torch.nanquantile(numbers, torch.tensor([0.025, 0.975], dtype=numbers.dtype)).tolist()
    return low, high


def resample(images: int, repeats: int, generator: torch.Generator) -> Float[Tensor, "repeats n"]:
    """How often each image is drawn when as many are drawn as there are."""
    drawn = torch.randint(images, (repeats, images), generator=generator)
    counts = torch.zeros(repeats, images, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64).expand(repeats, images))


def measure(
    per_image: Shaped[Tensor | np.ndarray, "n *values"],
    statistic: Statistic = mean,
    *,
    seed: int = 0,
    repeats: int = 1000,
) -> Metric:
    """A number over all images with its interval; arguments as for `bootstrap_ci`.

    Raises:
        InputError: no images, or values that give no number.
    """
    values = torch.as_tensor(per_image).cpu()
    n = len(values)
    if n == 0:
        raise InputError("nothing was measured: 0 images; check the data folder and the split")
    value = statistic(values, torch.ones(1, n, dtype=torch.float64)).item()
    if not np.isfinite(value):
        raise InputError(f"{n} images give the score {value}; check that they have labels, and run the model in fp32")
    if n == 1:
        return Metric(value=value, n=n)
    numbers = bootstrap(values, statistic, seed=seed, repeats=repeats)
    return Metric(value=value, n=n, ci95=middle(numbers), resamples=tuple(numbers.tolist()))
