"""Figures of token norms: 3, 4a, 4c, 7, 10 and 16 of the paper; 4, 5 and 8 (a, b) of the study."""

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.analyses.norm_history import EDGES, QUANTILES, NormSummary, plot_model_norms, summarise_norms
from vitreg_eval.analyses.norms import plot_norms_by_kind, plot_norms_per_block
from vitreg_eval.analyses.outlier_positions import OutlierPositions, outlier_positions, plot_outlier_positions
from vitreg_eval.diagnosis import outlier_metrics
from vitreg_eval.doctor_page import plot_norms_of_images
from vitreg_eval.exam import Exam
from vitreg_eval.figures.drawn import Drawing, Drawn, found_of, wrapped
from vitreg_eval.figures.given import Given
from vitreg_eval.figures.histograms import plot_histograms
from vitreg_eval.metrics import Metric, measure

FEW, MANY = 4, 8
"""Images that are shown."""


def last_norms(given: Given) -> dict[str, Float[Tensor, "b p"]]:
    """Norms of the patches after the last block, of at most 1,024 images."""
    return {exam.name: exam.survey.spread("norms")[:, -1] for exam in given.exams}


def metrics_of(exam: Exam, cutoff: float | None) -> dict[str, Metric]:
    """The verdict in numbers, and the share above a cutoff of one's own."""
    metrics = outlier_metrics(exam.diagnosis, exam.options.seed)
    images = len(exam.survey)
    if exam.diagnosis.judged.ratio is not None:
        metrics["outlier_ratio"] = Metric(value=exam.diagnosis.judged.ratio, n=images)
    if exam.diagnosis.emergence is not None:
        metrics["emergence_depth"] = Metric(value=exam.diagnosis.emergence / len(exam.diagnosis.blocks), n=images)
    if cutoff is not None:
        above = torch.cat([(norms[:, -1] > cutoff).double().mean(dim=1) for norms in exam.survey.pieces("norms")])
        metrics[f"fraction_above_{cutoff:g}"] = measure(above, seed=exam.options.seed)
    return metrics


def verdicts(given: Given) -> Drawn:
    """The numbers of every model, without a picture."""
    metrics = {exam.name: metrics_of(exam, given.options.cutoff) for exam in given.exams}
    return Drawn(metrics=metrics, models=given.records, data=given.data)


def summaries(norms: Mapping[str, Float[Tensor, "b p"]]) -> dict[str, NormSummary]:
    """Quantiles, spread, tail and counts by norm."""
    return {name: summarise_norms(values) for name, values in norms.items()}


def histograms(given: Given) -> Drawn:
    """Norms of the patches of every model, one below the other."""
    norms = last_norms(given)
    found = [exam.diagnosis.judged for exam in given.exams]
    drawing = Drawing(
        plot_histograms(norms, found, given.options.cutoff),
        "Norms of patch tokens after the last block, before the final norm; all models on the same axes.",
    )
    arrays = {"edges": EDGES, "quantiles": QUANTILES, "norms": summaries(norms)}
    return verdicts(given) | Drawn({"histogram": drawing}, arrays)


def norm_maps(given: Given, count: int = MANY) -> Drawn:
    """Norm maps of some images; all models share images and colours."""
    chosen = given.shown(count)
    drawing = Drawing(
        plot_norms_of_images(given.exams, chosen),
        "Norms of patch tokens, all colours on one logarithmic scale; red squares are outliers. Images from most to "
        "fewest outliers of the first model, evenly spread.",
    )
    maps = {exam.name: on_grid(exam, chosen) for exam in given.exams}
    return verdicts(given) | Drawn({"maps": drawing}, {"norm_maps": maps, "images": chosen_names(given, chosen)})


def on_grid(exam: Exam, chosen: list[int]) -> Float[Tensor, "b rows cols"]:
    """Norms after the last block of some images of the sample."""
    return exam.sample.norms[chosen, -1].unflatten(-1, exam.survey.grid)


def chosen_names(given: Given, chosen: list[int]) -> list[str]:
    """What a user knows some images of the sample by; numbers of drawn ones."""
    first = given.exams[0]
    rows = first.sample.rows[chosen].tolist()
    return [first.survey.images.names[row] if first.survey.images.names else f"scene {row}" for row in rows]


def maps_and_histogram(given: Given) -> Drawn:
    """Figure 3: where the high norms are, and how they lie apart from the others."""
    return norm_maps(given, FEW) | histograms(given)


def with_and_without(given: Given) -> Drawn:
    """Figure 7: histograms with and without registers, and beside the patches every other kind of token."""
    found = histograms(given)
    for exam in given.exams:
        if exam.survey.prefix:
            caption = f"{exam.name}: norms by kind of token."
            found.pictures[f"kinds_{exam.name}"] = Drawing(plot_norms_by_kind(exam.kinds(), exam.name), caption)
    counts = [exam.model.num_registers for exam in given.exams]
    if not any(counts):
        found.missing["with registers"] = "no model with registers; give one more --model"
    if all(counts):
        found.missing["without registers"] = "no model without registers; give one more --model"
    return found


def blocks(given: Given) -> Drawn:
    """Norms after every block, of every model."""
    norms = {exam.name: exam.survey.spread("norms").transpose(0, 1) for exam in given.exams}
    told = [e.diagnosis.emergence for e in given.exams]
    words = ["no outlier mode that lasts" if one is None else f"first in block {one}" for one in told]
    drawing = Drawing(
        plot_norms_per_block(norms, words),
        "Norms of patch tokens after each block, before the final norm; darker where more tokens are.",
    )
    by_block = {name: [summarise_norms(one) for one in values] for name, values in norms.items()}
    arrays = {"edges": EDGES, "quantiles": QUANTILES, "blocks": by_block}
    return verdicts(given) | Drawn({"blocks": drawing}, arrays)


def sizes(given: Given) -> Drawn:
    """Figure 4c: the norms of several models side by side, by number of parameters."""
    order = sorted(given.models, key=lambda name: sum(one.numel() for one in given.models[name].parameters()))
    norms = last_norms(given)
    found = summaries({name: norms[name] for name in order})
    drawing = Drawing(
        plot_model_norms([wrapped(name) for name in order], list(found.values())),
        "Norms after the last block, smallest model first.",
    )
    missing = {} if len(order) > 1 else {"other sizes": "one model shows no trend; give more --model"}
    arrays = {"edges": EDGES, "quantiles": QUANTILES, "norms": found}
    return verdicts(given) | Drawn({"sizes": drawing}, arrays, missing=missing)


def positions(given: Given) -> Drawn:
    """Figure 10: where outliers sit, by the rule and by a cutoff of one's own."""
    attempts = {exam.name: partial(by_rule, exam) for exam in given.exams}
    cutoff = given.options.cutoff
    if cutoff is not None:
        attempts |= {f"{e.name}, norm > {cutoff:g}": partial(by_cutoff, e, cutoff) for e in given.exams}
    found, missing = found_of(attempts)
    pictures = {
        name: Drawing(plot_outlier_positions(one), f"{name}: where the outliers are, beside what chance gives.")
        for name, one in found.items()
    }
    metrics = {name: position_metrics(one) for name, one in found.items()}
    return verdicts(given) | Drawn(pictures, {"positions": found}, metrics, missing)


def by_rule(exam: Exam) -> OutlierPositions:
    """Positions of what the rule calls outliers."""
    if exam.positions is None:
        raise InputError(exam.missing["outlier positions"])
    return exam.positions


def by_cutoff(exam: Exam, cutoff: float) -> OutlierPositions:
    """Positions of what lies above a cutoff."""
    marked = torch.cat([norms[:, -1] > cutoff for norms in exam.survey.pieces("norms")])
    return outlier_positions(marked, exam.survey.grid, seed=exam.options.seed)


def position_metrics(found: OutlierPositions) -> dict[str, Metric]:
    """Unevenness in numbers."""
    values = {
        "largest_position_share": float(found.share.max()),
        "top5_share": found.concentration.top_share,
        "gini": found.concentration.gini,
    }
    return {name: Metric(value=value, n=found.images) for name, value in values.items()}
