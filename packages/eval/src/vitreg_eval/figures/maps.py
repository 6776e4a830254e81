"""Figures of maps: 1, 2, 8 (top), 9, 14 and 15 of the paper; 1, 7 and 10 of the study."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_core.precision import use_precision
from vitreg_core.vit import VisionTransformer

from vitreg_eval.analyses.attention import looks, peakiness, pick_images, plot_attention, top_share
from vitreg_eval.analyses.components import plot_components
from vitreg_eval.analyses.focus import Focus, plot_focus
from vitreg_eval.analyses.register_similarity import MapSimilarity, plot_similarity
from vitreg_eval.doctor_page import attention_maps, query
from vitreg_eval.exam import Exam
from vitreg_eval.figures.drawn import Drawing, Drawn, found_of, wrapped
from vitreg_eval.figures.given import Given
from vitreg_eval.figures.norms import FEW, MANY, chosen_names
from vitreg_eval.metrics import Metric, measure

FACTOR = 2
"""How much larger than in training the images of figure 1 are."""


def peaks(maps: Float[Tensor, "b rows cols"], seed: int) -> dict[str, Metric]:
    """How peaky maps are, mean over images."""
    return {
        "peakiness": measure(peakiness(maps), seed=seed),
        "top_2_percent_share": measure(top_share(maps), seed=seed),
    }


def all_maps(exam: Exam) -> Float[Tensor, "b rows cols"]:
    """Where the class token looks, or what stands for it, in all images."""
    return torch.cat([maps[:, 0] for maps in exam.survey.pieces("attention")])


def drawn_maps(
    given: Given, exams: Mapping[str, Exam], maps: Mapping[str, Float[Tensor, "b rows cols"]], chosen: list[int]
) -> Drawn:
    """Images in rows, models in columns."""
    images = [given.exams[0].picture(index) for index in chosen]
    whose = "; ".join(f"{name}: {query(exam)}" for name, exam in exams.items())
    drawing = Drawing(plot_attention(images, maps), f"Attention in the last block, mean over heads. Queries: {whose}.")
    arrays = {"attention": dict(maps), "images": chosen_names(given, chosen)}
    return Drawn({"attention": drawing}, arrays, models=given.records, data=given.data)


def attention(given: Given, chosen: Sequence[int] | None = None, count: int = FEW) -> Drawn:
    """Attention of every model on the same images, and how peaky it is over all of them."""
    exams, missing = given.with_maps()
    chosen = list(given.shown(count) if chosen is None else chosen)
    metrics = {name: peaks(all_maps(exam), given.options.seed) for name, exam in exams.items()}
    found = drawn_maps(given, exams, {name: attention_maps(exam, chosen) for name, exam in exams.items()}, chosen)
    return found | Drawn(metrics=metrics, missing=missing)


def many(given: Given) -> Drawn:
    """Figure 14: attention on more images."""
    return attention(given, count=MANY)


def by_peakiness(given: Given) -> Drawn:
    """Attention on the least peaky, the median and the peakiest image."""
    return attention(given, picked(given))


def picked(given: Given) -> list[int]:
    """Images of the sample, by how peaky the first model that shows its attention is on them."""
    exams, _ = given.with_maps()
    first = next(iter(exams.values()))
    scores = peakiness(first.survey.store.rows("attention", first.sample.rows)[:, 0])
    return list(dict.fromkeys(pick_images(scores)))


def by_registers_and_peakiness(given: Given) -> Drawn:
    """Attention by number of registers, on the least peaky, the median and the peakiest image."""
    return by_registers(given, picked(given))


def by_registers(given: Given, chosen: Sequence[int] | None = None) -> Drawn:
    """Attention by number of registers."""
    exams, missing = given.with_maps()
    order = sorted(exams.values(), key=lambda exam: exam.model.num_registers)
    chosen = list(given.shown(FEW) if chosen is None else chosen)
    maps = {f"{exam.model.num_registers} registers: {exam.name}": attention_maps(exam, chosen) for exam in order}
    metrics = {exam.name: peaks(all_maps(exam), given.options.seed) for exam in order}
    if len({exam.model.num_registers for exam in order}) < 2:
        missing["other numbers of registers"] = "all models have the same; give more --model"
    return drawn_maps(given, exams, maps, chosen) | Drawn(metrics=metrics, missing=missing)


def enlarged(given: Given) -> Drawn:
    """Figure 1: attention at twice the image size."""
    exams, missing = given.with_maps()
    chosen = given.shown(FEW)
    maps = {name: enlarged_maps(given, exam, chosen) for name, exam in exams.items()}
    metrics = {name: peaks(one, given.options.seed) for name, one in maps.items()}
    return drawn_maps(given, exams, maps, chosen) | Drawn(metrics=metrics, missing=missing)


@torch.no_grad()
def enlarged_maps(given: Given, exam: Exam, chosen: Sequence[int]) -> Float[Tensor, "b rows cols"]:
    """Where a model looks in some images of the sample at twice their size; a foreign one at their own."""
    model = exam.model
    if not isinstance(model, VisionTransformer):
        return attention_maps(exam, chosen)
    images, maps = given.enlarged(model, FACTOR).images, []
    for row in exam.sample.rows[list(chosen)].tolist():
        image = next(images.batches(row, row + 1)).images.to(model.device)
        with use_precision(given.options.precision, model.device):
            weights = model.attention(image, -1).float().cpu()
        grid = (image.shape[-2] // model.patch_size, image.shape[-1] // model.patch_size)
        maps.append(looks(weights, model.prefix, grid).maps)
    return torch.cat(maps)


def registers(given: Given) -> Drawn:
    """Figure 9: attention of class token and every register of the models that have some."""
    exams, missing = with_registers(given)
    found = Drawn(missing=missing, models=given.records, data=given.data)
    chosen = given.shown(FEW)
    images = [given.exams[0].picture(index) for index in chosen]
    for name, exam in exams.items():
        maps = exam.survey.store.rows("attention", exam.sample.rows[chosen])
        named = dict(zip(exam.prefix_names, maps.unbind(dim=1), strict=True))
        found.pictures[name] = Drawing(plot_attention(images, named), f"{name}: attention by token, mean over heads.")
        found.arrays[name] = named
        likeness: MapSimilarity | None = exam.register_similarity
        if likeness is not None:
            caption = f"{name}: how alike the maps are, mean over {likeness.images} images."
            found.pictures[f"{name}_likeness"] = Drawing(plot_similarity(likeness), caption)
            found.metrics[name] = likeness_metrics(likeness)
            found.arrays[f"{name} likeness"] = likeness
    return found


def likeness_metrics(found: MapSimilarity) -> dict[str, Metric]:
    """Means over pairs of registers, where there are two."""
    values = {"cosine_of_registers": found.mean_cosine, "correlation_of_registers": found.mean_pearson}
    return {name: Metric(value=value, n=found.images) for name, value in values.items() if value is not None}


def with_registers(given: Given) -> tuple[dict[str, Exam], dict[str, str]]:
    """Models with registers that show their attention.

    Raises:
        InputError: there is none.
    """

    def look(exam: Exam) -> Exam:
        if not exam.model.num_registers:
            raise InputError("a model without registers")
        exam.need("attention")
        return exam

    return found_of({exam.name: partial(look, exam) for exam in given.exams})


def components(given: Given) -> Drawn:
    """Figure 15: the first principal component of the patches."""
    found, missing = given.evidence("components")
    chosen = given.shown(FEW)
    maps = {name: replace(one, maps=one.maps[chosen]) for name, one in found.items()}
    images = [given.exams[0].picture(index) for index in chosen]
    drawing = Drawing(
        plot_components(images, {wrapped(name): one for name, one in maps.items()}),
        "First principal component of the patches before the final norm.",
    )
    arrays = {"components": maps, "images": chosen_names(given, chosen)}
    return Drawn({"components": drawing}, arrays, missing=missing, models=given.records, data=given.data)


def focus(given: Given) -> Drawn:
    """Figure 10 of the study: where class token and registers look on average."""
    found: dict[str, Focus]
    found, missing = given.evidence("focus")
    caption = "Attention of class token and registers in the last block, mean over all images; crosses: centre of mass."
    metrics = {name: focus_metrics(one) for name, one in found.items()}
    drawing = Drawing(plot_focus({wrapped(name): one for name, one in found.items()}), caption)
    return Drawn({"focus": drawing}, {"focus": found}, metrics, missing, given.records, given.data)


def focus_metrics(found: Focus) -> dict[str, Metric]:
    """Entropy of each token's mean map over that of an even one."""
    entropies = found.relative_entropy.tolist()
    return {
        f"relative_entropy_{name.replace(' ', '_')}": Metric(value=value, n=found.images)
        for name, value in zip(found.names, entropies, strict=True)
    }
