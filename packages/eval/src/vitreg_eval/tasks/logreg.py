"""Logistic regression on the frozen class token; the penalty is chosen on a held-out part of the training set."""

from pathlib import Path

import torch
from vitreg_core.config import override
from vitreg_core.data.images import Preprocess
from vitreg_core.features import Backbone

from vitreg_eval.config import LogregOptions
from vitreg_eval.extract import Extracted
from vitreg_eval.labelled_features import class_count, hold_out, labelled_features
from vitreg_eval.logistic import STRENGTHS, Fitted, Problem, fit_path
from vitreg_eval.metrics import Metric
from vitreg_eval.results import Outcome
from vitreg_eval.scoring import score, score_alone


def run(backbone: Backbone, options: LogregOptions, out: Path) -> Outcome:  # noqa: ARG001 (draws nothing)
    """Top-1 accuracy, 0 to 1, and the strength C of the classifier; photos are resized to the crop, as in DINOv2."""
    tight = Preprocess(override(backbone.preprocess.config, {"crop_ratio": 1.0}))
    found = labelled_features(backbone, options, preprocess=tight)
    device = backbone.device if backbone.device.type == "cuda" else torch.device("cpu")
    best, tried = choose(found.train, options, found.classes, device)
    notes = [f"C = {best.strength:.3g} chosen on {options.held_out:.0%} of train, then fitted on all of it"]
    if unfinished := [one.strength for one in (*tried, best) if one.passes >= options.passes]:
        notes.append(f"not converged for C = {', '.join(f'{c:.3g}' for c in unfinished)}; give more --passes")
    if best.strength in (STRENGTHS[0], STRENGTHS[-1]):
        notes.append("C is at the end of what is tried; another may be better")
    return Outcome(report(best, found.test, options), found.test.data, [*found.notes, *notes])


def evaluate(train: Extracted, test: Extracted, options: LogregOptions) -> dict[str, Metric]:
    """Score on the test set of a classifier fitted on the training set, and its C."""
    best, _ = choose(train, options, class_count(train.targets[options.label]), train.cls.device)
    return report(best, test, options)


def report(best: Fitted, test: Extracted, options: LogregOptions) -> dict[str, Metric]:
    """Score on the test set."""
    name, metric = score(best.scores(test.cls), test.targets[options.label], options.seed)
    return {name: metric, "C": Metric(value=best.strength, n=metric.n, note="chosen on a held-out part of train")}


def choose(train: Extracted, options: LogregOptions, classes: int, device: torch.device) -> tuple[Fitted, list[Fitted]]:
    """Fit with every C on a part of the training set, and with the best one on all; of equal ones the smallest.

    Returns:
        The classifier, and those it was chosen from.
    """
    labels, features = train.targets[options.label], train.cls
    rest, held = hold_out(len(labels), options.held_out, options.seed)
    dtype = torch.float64 if options.float64 else torch.float32
    part = Problem(features[rest], labels[rest], classes, dtype=dtype, device=device)
    tried = list(fit_path(part, STRENGTHS, passes=options.passes))
    best = max(tried, key=lambda one: score_alone(one.scores(features[held]), labels[held]))
    whole = Problem(features, labels, classes, dtype=dtype, device=device)
    *_, fitted = fit_path(whole, [c for c in STRENGTHS if c <= best.strength], passes=options.passes)
    return fitted, tried
