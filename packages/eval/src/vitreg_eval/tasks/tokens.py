"""What single tokens know of the image: logistic regression on one token per image (Darcet et al. 2024, table 1).

Every image stands for itself by its class token, by each of its registers, by one of its normal patches and by one of
its outliers. The patches are drawn at random, several times with seeds of their own. Images without an outlier are left
out of all rows, so that the rows compare the same images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from vitreg_core.capturing import capture
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone, Features
from vitreg_core.outliers import find_outliers
from vitreg_core.precision import use_precision

from vitreg_eval.config.tokens import TokensOptions
from vitreg_eval.datasets import image_set
from vitreg_eval.datasets.examples import Examples, subset
from vitreg_eval.datasets.labelled import open_splits
from vitreg_eval.extract import progress
from vitreg_eval.labelled_features import hold_out
from vitreg_eval.logistic import STRENGTHS, Problem, fit_path
from vitreg_eval.metrics import Metric, Statistic, measure
from vitreg_eval.results import DataRecord, Outcome
from vitreg_eval.scoring import mean_average_precision, pairs, right, score_alone

HELD_OUT = 0.1
"""Part of the training images that the strength is chosen on, as DINOv2 does."""
FEWEST = 10
"""Training images, at least."""


@dataclass(frozen=True)
class Tokens:
    """One token of each kind for every image, after the final norm; rows without one hold zeros."""

    kinds: dict[str, Float[Tensor, "draws n d"]]
    """`cls` and `register_0`, `register_1`, ... (those that the model has), a single draw each; `normal`, and `outlier`
    (if there is a cutoff), drawn several times."""
    there: Bool[Tensor, " n"]
    """Images that have every kind."""
    has_outlier: Bool[Tensor, " n"]
    """Images with at least one outlier."""
    labels: Tensor


def run(backbone: Backbone, options: TokensOptions, out: Path) -> Outcome:  # noqa: ARG001 (draws nothing)
    """Accuracy `<kind>_top1`, or `<kind>_map` where images show several classes, and `outlier_images`.

    Kinds: `cls`, `normal`, `outlier`, `register_0`, `register_1`, ..., as far as there are such tokens.

    Raises:
        InputError: no labelled images, splits that share one, or too few images with outliers.
    """
    splits = open_splits(options.dataset, options.data)
    cutoff = options.cutoff or find_cutoff(backbone, splits.train, options)
    fitted, judged = (
        collect(backbone, examples, options, cutoff, index) for index, examples in enumerate((splits.train, splits.val))
    )
    check(fitted, judged, cutoff)
    metrics = dict(judge(fitted, judged, kind, options, len(splits.train.classes)) for kind in fitted.kinds)
    metrics["outlier_images"] = measure(judged.has_outlier, seed=options.seed)
    notes = [*splits.notes, describe(fitted, judged, cutoff)]
    if cutoff is not None:
        metrics["cutoff"] = Metric(value=cutoff, n=len(judged.labels))
    return Outcome(metrics, splits.val.data, notes)


def describe(train: Tokens, val: Tokens, cutoff: float | None) -> str:
    """Which images the numbers stand for."""
    if cutoff is None:
        return "no outlier mode in the norms of the patches, so that all patches count as normal; --cutoff sets one"
    return (
        f"on images with outliers, norm above {cutoff:.4g}: {int(train.there.sum())} of {len(train.there)} to train "
        f"on, {int(val.there.sum())} of {len(val.there)} to judge by; the others are left out of every row"
    )


def find_cutoff(backbone: Backbone, examples: Examples, options: TokensOptions) -> float | None:
    """Norm above which a patch is an outlier; None where the patches have no outlier mode."""
    count = min(options.calibration_images, len(examples))
    chosen = torch.arange(count) * len(examples) // count
    norms = [one.norms for one in passes(backbone, subset(examples, chosen, few(examples.data, count)), options)]
    return find_outliers(torch.cat(norms)).cutoff


def few(data: DataRecord, count: int) -> DataRecord:
    """Record of some images of a set, for the batches alone."""
    return data.model_copy(update={"n": count})


class Pass(NamedTuple):
    """Tokens of a batch, in float32 on the CPU."""

    features: Features
    """After the final norm."""
    norms: Float[Tensor, "b p"]
    """Of the patches, before it."""


@torch.no_grad()
def passes(backbone: Backbone, examples: Examples, options: TokensOptions) -> Iterator[Pass]:
    """Tokens of all examples, batch by batch."""
    images = image_set(examples, backbone.preprocess, options.batch_size)
    for batch in progress(images, f"tokens of {examples.data.name} {examples.data.split}"):
        with use_precision(options.precision, backbone.device), capture(backbone, -1, "after") as captured:
            features = backbone.features(batch.images.to(backbone.device))
        plain = captured.after[-1][:, backbone.num_prefix_tokens :]
        yield Pass(to_cpu(features), plain.float().norm(dim=-1).cpu())


def to_cpu(features: Features) -> Features:
    """Features in float32 on the CPU."""
    cls = None if features.cls is None else features.cls.float().cpu()
    return Features(cls, features.registers.float().cpu(), features.patches.float().cpu(), features.grid)


def collect(
    backbone: Backbone, examples: Examples, options: TokensOptions, cutoff: float | None, stream: int
) -> Tokens:
    """One token of each kind for every image."""
    generators = [seeded(options.seed, stream, number) for number in range(options.draws)]
    parts: dict[str, list[Tensor]] = {}
    has_normal, has_outlier = [], []
    for features, norms in passes(backbone, examples, options):
        outliers = norms > (float("inf") if cutoff is None else cutoff)
        for kind, tokens in fixed(features).items():
            parts.setdefault(kind, []).append(tokens[None])
        for kind, among in (("normal", ~outliers), ("outlier", outliers)):
            drawn = [draw(features.patches, among, generator) for generator in generators]
            parts.setdefault(kind, []).append(torch.stack(drawn))
        has_normal.append((~outliers).any(dim=1))
        has_outlier.append(outliers.any(dim=1))
    if cutoff is None:
        parts.pop("outlier", None)
    there = torch.cat(has_normal) & (torch.cat(has_outlier) | (cutoff is None))
    kinds = {kind: torch.cat(batches, dim=1) for kind, batches in parts.items()}
    return Tokens(kinds, there, torch.cat(has_outlier), torch.as_tensor(examples.labels))


def seeded(seed: int, stream: int, number: int) -> torch.Generator:
    """The generator of one draw; no two draws, splits or seeds share one."""
    state = np.random.SeedSequence([seed, stream, number]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def fixed(features: Features) -> dict[str, Float[Tensor, "b d"]]:
    """The tokens that every image has one of, by kind."""
    cls = {} if features.cls is None else {"cls": features.cls}
    return cls | {f"register_{index}": token for index, token in enumerate(features.registers.unbind(dim=1))}


def draw(
    patches: Float[Tensor, "b p d"], among: Bool[Tensor, "b p"], generator: torch.Generator
) -> Float[Tensor, "b d"]:
    """One patch of each image at random among some of its own; zeros where there is none."""
    lots = torch.rand(among.shape, generator=generator).where(among, -1.0)
    chosen = lots.argmax(dim=1)
    return patches[torch.arange(len(patches)), chosen] * among.any(dim=1)[:, None]


def check(train: Tokens, val: Tokens, cutoff: float | None) -> None:
    """Refuse sets that are left with too few images.

    Raises:
        InputError: fewer than ten training images, or no image to judge by.
    """
    count, others = int(train.there.sum()), int(val.there.sum())
    if count >= FEWEST and others:
        return
    if cutoff is None:
        raise InputError(f"{count} training and {others} other images; give {FEWEST} or more to train on")
    raise InputError(
        f"only {count} training and {others} other images have patches with norms both above and below {cutoff:.4g}; "
        "give another --cutoff, or more images"
    )


def judge(train: Tokens, val: Tokens, kind: str, options: TokensOptions, classes: int) -> tuple[str, Metric]:
    """Name and value of the score of one kind of token, mean over its draws."""
    truth = val.labels[val.there]
    drawn = zip(train.kinds[kind], val.kinds[kind], strict=True)
    scores = [
        classify(features[train.there], train.labels[train.there], others[val.there], options, classes)
        for features, others in drawn
    ]
    name, metric = average(scores, truth, options.seed)
    if len(scores) > 1:
        each = ", ".join(f"{score_alone(one, truth):.4f}" for one in scores)
        metric = metric.model_copy(update={"note": f"mean of {len(scores)} draws: {each}"})
    return f"{kind}_{name}", metric


def classify(
    features: Float[Tensor, "n d"],
    labels: Tensor,
    others: Float[Tensor, "m d"],
    options: TokensOptions,
    classes: int,
) -> Float[Tensor, "m classes"]:
    """Scores of other images by a regression whose strength is chosen on a held-out part of the training images."""
    rest, held = hold_out(len(labels), HELD_OUT, options.seed)
    tried = fit_path(Problem(features[rest], labels[rest], classes), STRENGTHS)
    best = max(tried, key=lambda one: score_alone(one.scores(features[held]), labels[held]))
    *_, whole = fit_path(Problem(features, labels, classes), [c for c in STRENGTHS if c <= best.strength])
    return whole.scores(others)


def average(scores: list[Float[Tensor, "m classes"]], truth: Tensor, seed: int) -> tuple[str, Metric]:
    """The measure of `scoring.score`, mean over several draws on the same images."""
    if truth.ndim == 1:
        return "top1", measure(
            torch.stack([right(one, truth) for one in scores], dim=1).double().mean(dim=1), seed=seed
        )
    values = torch.stack([pairs(one, truth) for one in scores], dim=1)
    return "map", measure(values, over_draws(mean_average_precision), seed=seed)


def over_draws(statistic: Statistic) -> Statistic:
    """The mean of a statistic over draws, the second dimension of the values."""
    return lambda values, counts: torch.stack([statistic(one, counts) for one in values.unbind(dim=1)]).mean(dim=0)
