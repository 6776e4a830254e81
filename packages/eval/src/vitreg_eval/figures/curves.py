"""Figure 8 of the paper: attention by number of registers, and accuracy by number of registers from earlier results."""

import re
from collections.abc import Iterator
from functools import partial

from matplotlib.figure import Figure
from vitreg_core.errors import InputError

from vitreg_eval.analyses.panels import panels
from vitreg_eval.analyses.registers import draw_curve
from vitreg_eval.figures.drawn import Drawing, Drawn, parts
from vitreg_eval.figures.given import Given
from vitreg_eval.figures.maps import by_registers
from vitreg_eval.metrics import Metric
from vitreg_eval.results import Result, read_result

MEASURES = {
    "linear": ("top1", "top1_val_selected"),
    "segment": ("miou",),
    "depth": ("rmse",),
    "knn": ("top1",),
    "logreg": ("top1",),
    "lost": ("corloc",),
}
"""Tasks whose results make curves, and what of them does."""
Curves = dict[str, dict[int, Metric]]
"""By task, measure and data: a number for each number of registers."""


def attention_and_accuracy(given: Given) -> Drawn:
    """Both halves of the figure, as far as there is something for each."""
    return parts({"attention": partial(by_registers, given), "curves": partial(curves, given)})


def curves(given: Given) -> Drawn:
    """Accuracy by number of registers.

    Raises:
        InputError: no results of two numbers of registers.
    """
    options = given.options
    if not options.results:
        raise InputError("no results of earlier runs; give --results with linear, segment or depth of several models")
    found: Curves = {}
    missing: dict[str, str] = {}
    for path in options.results:
        measured = list(points(given, read_result(path)))
        for name, count, metric in measured:
            found.setdefault(name, {})[count] = metric
        if not measured:
            missing[str(path)] = "its model is none of --model, and its numbers name no number of registers"
    kept = {name: dict(sorted(by_count.items())) for name, by_count in found.items() if len(by_count) > 1}
    missing |= {name: "one number of registers shows no trend" for name in found if name not in kept}
    if not kept:
        raise InputError("; ".join(f"{name}: {why}" for name, why in missing.items()))
    metrics = {f"{name}, {count} registers": one for name, counts in kept.items() for count, one in counts.items()}
    drawing = Drawing(plot_curves(kept), "From earlier results, with 95 % intervals over images.")
    return Drawn({"curves": drawing}, {"curves": kept}, {"earlier results": metrics}, missing)


def points(given: Given, found: Result) -> Iterator[tuple[str, int, Metric]]:
    """What of a result belongs to which number of registers: by name of the metric, or by the model's weights."""
    for measure in MEASURES.get(found.task, ()):
        name = f"{found.task} {measure} on {found.data.name}"
        for metric, value in found.metrics.items():
            if match := re.fullmatch(rf"{measure}_reg(\d+)", metric):
                yield name, int(match[1]), value
        count = registers_of(given, found)
        if measure in found.metrics and count is not None:
            yield name, count, found.metrics[measure]


def registers_of(given: Given, found: Result) -> int | None:
    """Registers of the model of a result: one of the given models, or one with its first registers alone."""
    if match := re.search(r", (\d+) registers$", found.model.source):
        return int(match[1])
    hashes = {record.hash: name for name, record in given.records.items()} if given.options.model else {}
    name = hashes.get(found.model.hash)
    return None if name is None else given.models[name].num_registers


def plot_curves(found: Curves) -> Figure:
    """A panel for every measure."""
    figure, grid = panels(1, len(found), width=3.2, height=2.8)
    for axes, (name, by_count) in zip(grid[0], found.items(), strict=True):
        draw_curve(axes, {str(count): metric for count, metric in by_count.items()})
        axes.set_title(name, fontsize=9)
    return figure
