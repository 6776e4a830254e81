"""How well scores name the classes of pictures: top-1, or mean average precision where a picture has several."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from vitreg_eval.metrics import Metric, measure, top_k

Labels = Int[Tensor, " n"] | Int[Tensor, "n classes"]
"""A class for each picture, or a row of 1 (there), 0 (not there), -1 (not judged)."""


def score(scores: Float[Tensor, "n classes"], truth: Labels, seed: int) -> tuple[str, Metric]:
    """Name and value of the measure that fits the labels, with its interval.

    Returns:
        `top1`, or `map` where a picture may have several classes: the area under the precision-recall curve, without
        interpolation, averaged over the classes that occur; what is not judged does not count.

    Raises:
        InputError: scores that are not numbers.
    """
    if truth.ndim == 1:
        return "top1", measure(right(scores, truth), seed=seed)
    return "map", measure(pairs(scores, truth), mean_average_precision, seed=seed)


def score_alone(scores: Float[Tensor, "n classes"], truth: Labels) -> float:
    """The same value, without an interval: what settings are chosen by."""
    if truth.ndim == 1:
        return right(scores, truth).double().mean().item()
    return mean_average_precision(pairs(scores, truth), torch.ones(1, len(truth), dtype=torch.float64)).item()


def right(scores: Float[Tensor, "n classes"], truth: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Whether each picture's class has the highest score; a class that the scores do not know is never named."""
    classes = max(scores.shape[1], int(truth.max()) + 1)
    missing = scores.new_full((len(scores), classes - scores.shape[1]), -torch.inf)
    return top_k(torch.cat([scores, missing], dim=1), truth)


def pairs(scores: Float[Tensor, "n classes"], truth: Int[Tensor, "n classes"]) -> Float[Tensor, "n 2 classes"]:
    """Scores and labels, together."""
    return torch.stack([scores.double(), truth.double()], dim=1)


def mean_average_precision(
    values: Float[Tensor, "n 2 classes"], counts: Float[Tensor, "repeats n"]
) -> Float[Tensor, " repeats"]:
    """Average precision, averaged over the classes; of scores and labels of every picture and how often it counts."""
    each = [average_precision(scores, truth, counts) for scores, truth in values.permute(2, 1, 0)]
    return torch.stack(each).nanmean(dim=0)


def average_precision(
    scores: Float[Tensor, " n"], truth: Shaped[Tensor, " n"], counts: Float[Tensor, "repeats n"]
) -> Float[Tensor, " repeats"]:
    """Precision at every score, weighed by what recall grows there; not a number without a positive."""
    judged = truth >= 0
    scores, order = scores[judged].sort(descending=True, stable=True)
    found = counts[:, judged][:, order]
    hits = (found * (truth[judged][order] == 1)).cumsum(dim=1)
    last = torch.cat([scores[1:] != scores[:-1], torch.ones_like(scores[:1], dtype=torch.bool)])  # of equal scores
    hits, named = hits[:, last], found.cumsum(dim=1)[:, last]
    gains = hits.diff(dim=1, prepend=torch.zeros_like(hits[:, :1]))
    return (gains * hits / named.clamp_min(1)).sum(dim=1) / hits[:, -1]
