"""k-nearest-neighbour classification of the class token."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone

from vitreg_eval.config import KnnOptions
from vitreg_eval.extract import Extracted, train_and_test
from vitreg_eval.metrics import Metric, measure
from vitreg_eval.results import Outcome


def run(backbone: Backbone, options: KnnOptions, out: Path) -> Outcome:  # noqa: ARG001 (draws nothing)
    """Top-1 accuracy, 0 to 1."""
    train, test = train_and_test(backbone, options)
    return Outcome(evaluate(train, test, options), test.data)


def evaluate(train: Extracted, test: Extracted, options: KnnOptions) -> dict[str, Metric]:
    """Accuracy on the test set of votes from the training set."""
    labels = train.targets[options.label]
    votes = knn_votes(train.cls, labels, test.cls, k=options.k, temperature=options.temperature)
    return {"top1": measure(votes.argmax(dim=-1) == test.targets[options.label], seed=options.seed)}


def knn_votes(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    *,
    k: int,
    temperature: float,
) -> Float[Tensor, "m classes"]:
    """Votes of the k most similar training samples, weighted by the softmax of cosine similarity (DINOv2's k-NN).

    Raises:
        InputError: fewer training samples than neighbours.
    """
    if k > len(train):
        raise InputError(f"k={k} neighbours of only {len(train)} training images; give a smaller --k")
    bank = F.normalize(train, dim=-1)
    one_hot = F.one_hot(labels).float()
    votes = []
    for chunk in F.normalize(test, dim=-1).split(1024):
        similarity, nearest = (chunk @ bank.T).topk(k, dim=-1)
        weights = (similarity / temperature).softmax(dim=-1)
        votes.append(torch.einsum("mk,mkc->mc", weights, one_hot[nearest]))
    return torch.cat(votes)
