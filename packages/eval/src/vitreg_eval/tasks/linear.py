"""Linear probe: logistic regression on the frozen class token."""

from pathlib import Path

import torch
from vitreg_core.features import Backbone

from vitreg_eval.config import LinearOptions
from vitreg_eval.extract import Extracted, train_and_test
from vitreg_eval.heads import fit_logistic
from vitreg_eval.metrics import Metric, measure
from vitreg_eval.results import Outcome


def run(backbone: Backbone, options: LinearOptions, out: Path) -> Outcome:  # noqa: ARG001 (draws nothing)
    """Top-1 accuracy, 0 to 1."""
    train, test = train_and_test(backbone, options)
    return Outcome(evaluate(train, test, options), test.data)


def evaluate(train: Extracted, test: Extracted, options: LinearOptions) -> dict[str, Metric]:
    """Accuracy on the test set of a probe fitted on the training set."""
    labels, truth = train.targets[options.label], test.targets[options.label]
    probe, _ = fit_logistic(train.cls, labels, int(labels.max()) + 1, options.seed)
    with torch.no_grad():
        predicted = probe(test.cls).argmax(dim=-1)
    return {"top1": measure(predicted == truth, seed=options.seed)}
