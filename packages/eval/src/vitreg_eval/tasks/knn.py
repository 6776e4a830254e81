"""k-nearest-neighbour classification of the class token."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone

from vitreg_eval.config import KnnOptions
from vitreg_eval.extract import Extracted
from vitreg_eval.labelled_features import labelled_features
from vitreg_eval.metrics import Metric
from vitreg_eval.results import Outcome
from vitreg_eval.scoring import score

TEST_ROWS, TRAIN_ROWS = 512, 16384
"""Similarities held in memory: 32 MiB."""


def run(backbone: Backbone, options: KnnOptions, out: Path) -> Outcome:  # noqa: ARG001 (draws nothing)
    """Top-1 accuracy, 0 to 1; mean average precision where a picture has several classes."""
    found = labelled_features(backbone, options)
    return Outcome(evaluate(found.train, found.test, options), found.test.data, found.notes)


def evaluate(train: Extracted, test: Extracted, options: KnnOptions) -> dict[str, Metric]:
    """Scores on the test set of votes from the training set, for each number of neighbours."""
    labels, truth = train.targets[options.label], test.targets[options.label]
    votes = knn_votes(train.cls, labels, test.cls, ks=options.k, temperature=options.temperature)
    single = len(options.k) == 1
    scores = {k: score(found, truth, options.seed) for k, found in votes.items()}
    return {name if single else f"{name}_k{k}": metric for k, (name, metric) in scores.items()}


def knn_votes(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"] | Int[Tensor, "n classes"],
    test: Float[Tensor, "m d"],
    *,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, Float[Tensor, "m classes"]]:
    """Votes of the k most similar training samples for several k, as the k-NN of DINOv2.

    Similarity is the cosine; the votes weigh as the softmax of similarity / temperature over the greatest k, of which
    the first k count. Of training samples that are equally similar the first ones vote.

    Args:
        train: features that vote.
        labels: a class for each, or a row of 1 for each class that is there; other values of a row do not vote.
        test: features to classify.
        ks: numbers of neighbours.
        temperature: of the softmax.

    Raises:
        InputError: fewer training samples than neighbours.
    """
    most = max(ks)
    if most > len(train):
        raise InputError(f"k={most} neighbours of only {len(train)} training images; give a smaller --k")
    classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    votes = {k: torch.zeros(len(test), classes) for k in ks}
    for start in range(0, len(test), TEST_ROWS):
        rows = slice(start, start + TEST_ROWS)
        similarity, nearest = neighbours(train, F.normalize(test[rows].float(), dim=-1), most)
        weights = (similarity / temperature).softmax(dim=-1)
        for k, found in votes.items():
            if labels.ndim == 2:
                there = (labels[nearest[:, :k]] == 1).float()
                found[rows] = torch.einsum("mk,mkc->mc", weights[:, :k], there)
            else:
                found[rows].scatter_add_(1, labels[nearest[:, :k]].long(), weights[:, :k])
    return votes


def neighbours(
    train: Float[Tensor, "n d"], queries: Float[Tensor, "m d"], k: int
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Greatest cosine similarities to queries of length 1, in descending order, and the samples they belong to."""
    best = torch.empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(train), TRAIN_ROWS):
        bank = F.normalize(train[start : start + TRAIN_ROWS].float(), dim=-1)
        found, where = greatest(queries @ bank.T, min(k, len(bank)))
        best, order = torch.cat([best, found], dim=1).sort(dim=1, descending=True, stable=True)
        places = torch.cat([places, where + start], dim=1).gather(1, order[:, :k])
        best = best[:, :k]
    return best, places


def greatest(values: Float[Tensor, "m n"], k: int) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """The k greatest of each row in descending order, and where; of equal ones the first."""
    found, places = values.topk(min(k + 1, values.shape[1]), dim=1)
    tied = (found[:, 1:] == found[:, :-1]).any(dim=1)
    found, places = found[:, :k].clone(), places[:, :k].clone()
    if tied.any():  # torch's choice and order among equal values are not defined
        found[tied], order = (part[:, :k] for part in values[tied].sort(dim=1, descending=True, stable=True))
        places[tied] = order
    return found, places
