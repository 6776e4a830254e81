"""Figures over training: 4b of the paper; 8 (c, d), 9 with 12, and 11 of the study."""

from functools import partial, reduce
from operator import add, or_

import torch
from jaxtyping import Float
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.analyses.filmstrip import filmstrip, plot_filmstrip
from vitreg_eval.analyses.norm_history import (
    EDGES,
    QUANTILES,
    NormHistory,
    norm_history,
    plot_norm_history,
    summarise_norms,
)
from vitreg_eval.analyses.register_similarity import (
    PUBLISHED,
    MapSimilarity,
    SimilarityCurve,
    map_similarity,
    plot_similarity_curves,
    similarity_curve,
    similarity_sums,
)
from vitreg_eval.figures.drawn import Drawing, Drawn, found_of, parts
from vitreg_eval.figures.given import Given, History, Seen
from vitreg_eval.figures.norms import blocks
from vitreg_eval.metrics import Metric

MOST_SHOWN = 8
"""Snapshots of a filmstrip, evenly spread from the first to the last."""


def norms(given: Given) -> Drawn:
    """Norms after the last block over the snapshots of every training."""
    found = Drawn(arrays={"edges": EDGES, "quantiles": QUANTILES}, data=given.histories[0].data)
    for history in given.histories:
        name = history.training.name
        one = norm_history(
            [seen.step for seen in history.seen],
            [summarise_norms(seen.survey.spread("norms")[:, -1]) for seen in history.seen],
        )
        caption = f"{name}: norms of patch tokens after the last block, over training."
        found.pictures[f"training_{name}"] = Drawing(plot_norm_history(one), caption)
        found.arrays[name] = one
        found.metrics[name] = history_metrics(one, history.training.steps)
        found.models.update(history.records)
    return found


def history_metrics(found: NormHistory, steps: int) -> dict[str, Metric]:
    """When outliers emerge, if they do, and how many there are at the end."""
    last = found.checkpoints[-1]
    metrics = {"last_outlier_fraction": Metric(value=last.outlier_fraction, n=last.images)}
    if found.emergence_step is not None:
        metrics["emergence_step"] = Metric(value=found.emergence_step, n=last.images)
        metrics["emergence_share_of_training"] = Metric(value=found.emergence_step / steps, n=last.images)
    return metrics


def blocks_and_training(given: Given) -> Drawn:
    """Figure 8 of the study: norms after every block, and over training."""
    return parts({"norms after every block": lambda: blocks(given), "norms over training": lambda: norms(given)})


def strips(given: Given) -> Drawn:
    """Figures 9 and 12 of the study: attention of class token and registers over training."""
    found, missing = found_of({one.training.name: partial(strip, one) for one in given.histories})
    return reduce(or_, found.values()) | Drawn(missing=missing)


def strip(history: History) -> Drawn:
    """The image that lost its peaks and the one that kept them."""
    seen = spread(history.seen)
    maps = attention_over_training(seen)
    first = seen[0].survey
    name = history.training.name
    found = filmstrip(maps, class_token="cls" in first.prefix)
    images = [history.picture(index) for index in (found.removed, found.persistent)]
    labels = [f"step {one.step}" for one in seen]
    shown = maps[:, [found.removed, found.persistent]]
    drawing = Drawing(
        plot_filmstrip(found, maps, images, labels), f"{name}: attention of class token and registers over training."
    )
    arrays = {name: {"filmstrip": found, "steps": [one.step for one in seen], "maps": shown}}
    return Drawn({name: drawing}, arrays, models=history.records, data=history.data)


def spread(seen: tuple[Seen, ...]) -> list[Seen]:
    """At most eight snapshots, the first and the last among them."""
    count = min(len(seen), MOST_SHOWN)
    return [seen[index * (len(seen) - 1) // (count - 1)] for index in range(count)]


def attention_over_training(seen: list[Seen]) -> Float[Tensor, "snapshots b prefix rows cols"]:
    """Attention maps of class token and registers, of at most 1,024 images.

    Raises:
        InputError: a model without them, or snapshots of different models.
    """
    first = seen[0].survey
    for one in seen:
        if "attention" in one.survey.missing:
            raise InputError(one.survey.missing["attention"])
        if (one.survey.prefix, one.survey.grid) != (first.prefix, first.grid):
            raise InputError(f"step {one.step} has other tokens than step {seen[0].step}; give one training")
    if not first.prefix:
        raise InputError("a model without class token and registers")
    return torch.stack([one.survey.spread("attention") for one in seen])


def likeness(given: Given) -> Drawn:
    """Figure 11 of the study: how alike the register maps are over training, beside its published curve."""
    found, missing = found_of({one.training.name: partial(curve, one) for one in given.histories})
    caption = "Mean over all pairs of registers and over images; the study's values are of other images."
    drawing = Drawing(plot_similarity_curves({**found, "study (other data)": PUBLISHED}), caption)
    metrics = {name: curve_metrics(one, given.histories[0]) for name, one in found.items()}
    models = reduce(or_, [one.records for one in given.histories])
    arrays = {"curves": found, "published": PUBLISHED}
    return Drawn({"likeness": drawing}, arrays, metrics, missing, models, given.histories[0].data)


def curve(history: History) -> SimilarityCurve:
    """Likeness of the register maps at every snapshot.

    Raises:
        InputError: fewer than two registers, or a model that does not show its attention.
    """
    if "attention" in history.seen[0].survey.missing:
        raise InputError(history.seen[0].survey.missing["attention"])
    found = similarity_curve({one.step / history.training.steps: similarity(one) for one in history.seen})
    if not found.progress:
        raise InputError("fewer than two registers, so that there is no pair of them to compare")
    return found


def similarity(seen: Seen) -> MapSimilarity:
    """Likeness of the maps of one snapshot, mean over all images."""
    sums = reduce(add, map(similarity_sums, seen.survey.pieces("attention")))
    return map_similarity(sums, class_token="cls" in seen.survey.prefix)


def curve_metrics(found: SimilarityCurve, history: History) -> dict[str, Metric]:
    """Both ends of a curve."""
    images = len(history.seen[0].survey)
    values = {
        "first_cosine": found.cosine[0],
        "last_cosine": found.cosine[-1],
        "first_correlation": found.pearson[0],
        "last_correlation": found.pearson[-1],
    }
    return {name: Metric(value=value, n=images) for name, value in values.items()}
