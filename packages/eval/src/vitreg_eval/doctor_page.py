"""The doctor's page: one model or several on the same images, the evidence in pictures, the advice at the end."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import TypeVar

import numpy as np
from einops import rearrange
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from vitreg_eval.advice import advise
from vitreg_eval.analyses.attention import peakiness, plot_attention
from vitreg_eval.analyses.complexity import plot_complexity
from vitreg_eval.analyses.components import ComponentMaps, plot_components
from vitreg_eval.analyses.facet_norms import plot_facet_norms
from vitreg_eval.analyses.focus import plot_focus
from vitreg_eval.analyses.massive import plot_massive_activations
from vitreg_eval.analyses.neighbours import NeighbourSimilarity, plot_neighbour_similarity
from vitreg_eval.analyses.norms import plot_norm_histogram, plot_norms_by_kind, plot_norms_per_block, worst_images
from vitreg_eval.analyses.outlier_positions import plot_outlier_positions
from vitreg_eval.analyses.overlap import plot_class_overlap, plot_overlap
from vitreg_eval.analyses.panels import OUTLIER_COLOUR, panels, show_image
from vitreg_eval.analyses.position_probe import plot_position_probe
from vitreg_eval.analyses.reconstruction import plot_reconstruction
from vitreg_eval.analyses.register_similarity import plot_similarity
from vitreg_eval.analyses.replacement import plot_replacement
from vitreg_eval.config import DoctorOptions
from vitreg_eval.effects import Effects
from vitreg_eval.exam import Exam
from vitreg_eval.metrics import Metric
from vitreg_eval.report import Cell, Page, Picture, Section, Table, comparison, picture, settings_section
from vitreg_eval.results import Result, number

SHOWN = 6
"""Images of the sample that are shown: from most to fewest outliers of the first model, evenly spread."""
SHOWN_NEURONS = 10


def page(
    exams: Sequence[Exam],
    metrics: Sequence[dict[str, Metric]],
    changed: Effects | None,
    told: str,
    options: DoctorOptions,
    settings: dict[str, object],
) -> Page:
    """The whole page; with several models, all share images and colour scales."""
    named = dict(zip((exam.name for exam in exams), metrics, strict=True))
    lead = [f"{exam.name}: {exam.diagnosis.verdict}." for exam in exams]
    lead += [f"What was done: {told}."] if told else []
    sections = [
        Section("In numbers", [images_line(exams[0])], table=comparison(named, {})),
        before_and_after(changed),
        where(exams),
        since_when(exams, options),
        who_writes(exams),
        what_they_hold(exams),
        which_images(exams),
        registers(exams),
        Section("What to do", steps=advise(exams[0])),
        Section("Left out", left_out_lines(exams, changed)),
        settings_section(settings),
    ]
    title = f"Does {Path(exams[0].model.source).name or exams[0].name} have artifacts?"
    return Page(title, lead, [section for section in sections if section != Section(section.title)])


def images_line(exam: Exam) -> str:
    """What was looked at."""
    data = exam.survey.images.images.data
    line = f"{len(exam.survey)} images of {data.name}; closer looks at {len(exam.sample.rows)} of them, evenly spread."
    if lost := exam.survey.unreadable:
        line += f" {len(lost)} cannot be read and are left out, such as {', '.join(lost[:5])}."
    return line


def each(exams: Sequence[Exam], draw: Callable[[Exam], Figure | None], caption: str) -> list[Picture]:
    """One figure for every model that has what it shows."""
    found = []
    for exam in exams:
        figure = draw(exam)
        if figure is not None:
            found.append(picture(figure, f"{exam.name}: {caption}"))
    return found


T = TypeVar("T")


def given(found: T | None, draw: Callable[[T], Figure]) -> Figure | None:
    """The figure of what was found, if it was; an empty collection is nothing."""
    return draw(found) if found else None


def where(exams: Sequence[Exam]) -> Section:
    """Norms, attention and the first principal component of some images."""
    first = exams[0]
    chosen = worst_images(first.sample.outliers, first.sample.norms[:, first.diagnosis.block], SHOWN)
    images = [first.picture(index) for index in chosen]
    figures = [
        picture(
            plot_norms_of_images(exams, chosen),
            "Norms of the patch tokens after the block that was judged, all colours on one logarithmic scale; red "
            "squares are outliers. Images from most to fewest outliers, evenly spread.",
        )
    ]
    looks = {exam.name: attention_maps(exam, chosen) for exam in exams if exam.survey.has("attention")}
    if looks:
        peaks = "; ".join(f"{name}: {float(peakiness(maps).mean()):.1f}" for name, maps in looks.items())
        caption = f"Attention of {query(first)}, last block, mean over heads. Mean of largest over median: {peaks}."
        figures.append(picture(plot_attention(images, looks), caption))
    components = {exam.name: maps for exam in exams if (maps := part_of_components(exam, chosen)) is not None}
    if components:
        caption = "First principal component of the patches before the final norm, in deviations of the normal ones."
        figures.append(picture(plot_components(images, components), caption))
    return Section("Where they are", figures=figures)


def query(exam: Exam) -> str:
    """Whose attention is shown."""
    return "the class token" if "cls" in exam.survey.prefix else "register 0" if exam.survey.prefix else "all patches"


def attention_maps(exam: Exam, chosen: Sequence[int]) -> Float[Tensor, "b rows cols"]:
    """Where the first token before the patches looks in some images of the sample."""
    return exam.survey.store.rows("attention", exam.sample.rows[list(chosen)])[:, 0]


def part_of_components(exam: Exam, chosen: Sequence[int]) -> ComponentMaps | None:
    """Maps of some images of the sample."""
    found = exam.components
    return None if found is None else replace(found, maps=found.maps[list(chosen)])


def plot_norms_of_images(exams: Sequence[Exam], chosen: Sequence[int]) -> Figure:
    """Images in the top row, and for each model a row of norm maps; all on one logarithmic scale."""
    figure, grid = panels(1 + len(exams), len(chosen))
    norms = [exam.sample.norms[list(chosen), exam.diagnosis.block].log() for exam in exams]
    low, high = min(float(one.min()) for one in norms), max(float(one.max()) for one in norms)
    for column, index in enumerate(chosen):
        show_image(grid[0, column], exams[0].picture(index))
        for row, (exam, values) in enumerate(zip(exams, norms, strict=True), 1):
            rows, cols = exam.survey.grid
            axes = grid[row, column]
            show_image(axes, rearrange(values[column], "(rows cols) -> rows cols", rows=rows, cols=cols).numpy())
            axes.images[0].set(cmap="magma", clim=(low, high))
            places = exam.sample.outliers[index].nonzero()[:, 0]
            axes.scatter(places % cols, places // cols, s=14, marker="s", facecolors="none", edgecolors=OUTLIER_COLOUR)
    for axes, name in zip(grid[:, 0], ("image", *(exam.name for exam in exams)), strict=True):
        axes.set_ylabel(fill(name, 18), fontsize=8)
    ticks = {f"{value:.3g}": np.log(value) for value in np.geomspace(np.exp(low), np.exp(high), 4)}
    bar = figure.colorbar(grid[-1, -1].images[0], ax=grid[1:], label="norm", aspect=30)
    bar.set_ticks(list(ticks.values()), labels=list(ticks))
    return figure


def since_when(exams: Sequence[Exam], options: DoctorOptions) -> Section:
    """Norms after every block, and the histogram after the last."""
    norms = {exam.name: exam.survey.spread("norms").transpose(0, 1) for exam in exams}
    verdicts = [f"first in block {e.diagnosis.emergence}" if e.diagnosis.emergence is not None else "" for e in exams]
    figures = [
        picture(
            plot_norms_per_block(norms, [verdict or "no outlier mode that lasts" for verdict in verdicts]),
            "Norms of patch tokens after each block, before the final norm; darker where more tokens are.",
        )
    ]
    figures += each(
        exams,
        lambda exam: plot_norm_histogram(norms[exam.name][exam.diagnosis.block], exam.diagnosis.judged, judged(exam)),
        "norms of the patch tokens, both axes logarithmic.",
    )
    figures += each(
        exams,
        lambda exam: plot_norms_by_kind(exam.kinds(), "by kind of token") if exam.survey.prefix else None,
        "the same by kind of token.",
    )
    return Section("Since which block", [rules_line(exam, options) for exam in exams], figures=figures)


def judged(exam: Exam) -> str:
    """After which block norms were judged."""
    return f"after block {exam.diagnosis.block} of {exam.model.depth}"


def rules_line(exam: Exam, options: DoctorOptions) -> str:
    """What other rules would say."""
    last = exam.diagnosis.judged
    norms = exam.survey.spread("norms")[:, exam.diagnosis.block]
    line = (
        f"{exam.name}: other rules, for comparison only: 98th percentile {number(last.evidence.percentile_98)} (always "
        f"2 % of the tokens), median + 5 MAD {last.evidence.mad5_share:.2%}, largest over median "
        f"{number(last.evidence.max_over_median)}, excess kurtosis of the log norms {number(last.evidence.kurtosis)}"
    )
    if options.cutoff is not None:
        line += f", above your cutoff {number(options.cutoff)}: {float((norms > options.cutoff).double().mean()):.2%}"
    return line + "."


def who_writes(exams: Sequence[Exam]) -> Section:
    """Hidden units that write the outliers, and the dimensions that they write."""
    text, rows = [], []
    for exam in exams:
        found = exam.neurons
        if found is None:
            continue
        text.append(f"{exam.name}: {found.verdict}.")
        ranked = list(zip(found.neurons, found.scores, strict=True))[:SHOWN_NEURONS]
        cells = [(exam.name, str(layer), str(unit), number(score)) for (layer, unit), score in ranked]
        rows += [list(map(Cell, row)) for row in cells]
    table = Table(["model", "block", "hidden unit", "contrast in standard deviations"], rows) if rows else None
    figures = each(
        exams,
        lambda exam: given(exam.massive, plot_massive_activations),
        "largest activations of all tokens after each block, and the median.",
    )
    return Section("What writes them", text, table=table, figures=figures)


def what_they_hold(exams: Sequence[Exam]) -> Section:
    """What normal and outlier tokens know of their place and of their patch."""
    figures = each(
        exams,
        lambda exam: given(exam.position_probe, plot_position_probe),
        "a linear probe names the position of a patch from its token, on images that it was not fitted on.",
    )
    figures += each(
        exams,
        lambda exam: given(exam.linear, lambda linear: plot_reconstruction(linear, exam.mlp)),
        "pixels of a patch predicted from its token, on images that the prediction was not fitted on.",
    )
    figures += each(
        exams,
        lambda exam: given(neighbours(exam), plot_neighbour_similarity),
        "cosine of patches with their neighbours, at the input (embeddings before positions) and at the output.",
    )
    figures += each(
        exams,
        lambda exam: given(exam.facets, plot_facet_norms),
        "norms of queries, keys and values in the last block, for normal patches and outliers.",
    )
    text = [
        "Outliers that keep to a few positions are named by their position alone, without a token that knows it: read "
        "the bars beside the dotted lines, the best that a fixed answer does."
    ]
    return Section("What they hold", text * any(exam.position_probe is not None for exam in exams), figures=figures)


def neighbours(exam: Exam) -> dict[str, NeighbourSimilarity]:
    """Likeness of neighbours at input and output, as far as the model shows them."""
    named = {"input": exam.input_neighbours, "output": exam.output_neighbours}
    return {name: found for name, found in named.items() if found is not None}


def which_images(exams: Sequence[Exam]) -> Section:
    """Positions and images that outliers prefer."""
    figures = each(
        exams,
        lambda exam: given(exam.positions, plot_outlier_positions),
        "positions of the outliers, beside what chance would give as many.",
    )
    figures += each(
        exams,
        lambda exam: given(exam.complexity, lambda one: plot_complexity(one, "largest over median norm")),
        "artifact score of each image against how complex the picture is.",
    )
    return Section("Which positions and images", figures=figures)


def registers(exams: Sequence[Exam]) -> Section:
    """Class token and registers: where they look, how alike they are, what they hold."""
    looks = {exam.name: exam.focus for exam in exams if exam.focus is not None}
    figures = []
    if looks:
        caption = "Attention of class token and registers in the last block, mean over all images."
        figures.append(picture(plot_focus(looks), caption))
    figures += each(
        exams,
        lambda exam: given(exam.register_similarity, plot_similarity),
        "how alike the maps of class token and registers are, mean over images.",
    )
    figures += each(
        exams,
        lambda exam: given(exam.overlap, plot_overlap),
        "overlap of the maps with the objects of the images, and how often each register is the best one.",
    )
    figures += each(
        exams,
        lambda exam: given(exam.class_overlap, plot_class_overlap),
        "overlap of each map with the patches of each class, mean and spread over images.",
    )
    figures += each(
        exams,
        lambda exam: given(exam.replacement, plot_replacement),
        "what changes when the registers are replaced after every block.",
    )
    return Section("Class token and registers", figures=figures)


def before_and_after(changed: Effects | None) -> Section:
    """What a remedy does to the numbers that count, and to the time."""
    if changed is None:
        return Section("")
    rows = [
        [
            Cell(f"{one.first.task} {row.metric}", described(one.first, row.n)),
            Cell(number(row.first)),
            Cell(number(row.other)),
            Cell(f"{row.difference:+.4g}", "" if row.ci95 is None else f"{row.ci95[0]:+.4g} to {row.ci95[1]:+.4g}"),
            Cell(row.verdict),
        ]
        for one in changed.compared
        for row in one.differences
        if row.metric not in CONSTANT
    ]
    text = [f"A forward pass takes {changed.time_ratio:.3g} times as long, median of passes in turn."]
    told = [f"{one.first.task}: {note}." for one in changed.compared for note in (*one.first.notes, *one.other.notes)]
    text += dict.fromkeys([*told, *(f"{note}." for one in changed.compared for note in one.notes[-1:])])
    table = Table(["measure", "before", "after", "after - before, 95 % interval", ""], rows) if rows else None
    return Section("Before and after", text, table)


CONSTANT = ("corloc_whole_image", "corloc_center", "corloc_random")
"""Baselines that no model changes."""


def described(one: Result, images: int) -> str:
    """Data of a measure, and what LOST read."""
    words = [one.data.name, *([one.settings["features"]] if one.task == "lost" else []), f"n={images}"]
    return ", ".join(words)


def left_out_lines(exams: Sequence[Exam], changed: Effects | None) -> list[str]:
    """What could not be looked at, and why."""
    lines = [
        f"{exam.name}: {name}: {why}" for exam in exams for name, why in (exam.survey.missing | exam.missing).items()
    ]
    return lines + [f"{name}: {why}" for name, why in (changed.missing if changed else {}).items()]
