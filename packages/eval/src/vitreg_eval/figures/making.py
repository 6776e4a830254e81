"""A figure of the paper or of the study with one's own models: pictures, arrays, a record, and a page.

What cannot be made is listed with what is missing. Of several processes, all look at the images, and the first draws.
"""

import base64
import io
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeFloat
from vitreg_core.config import Config
from vitreg_core.errors import InputError
from vitreg_core.provenance import commit, versions

from vitreg_eval import report
from vitreg_eval.config.paper import ALL, FIGURES, NAMES, TABLES, PaperOptions
from vitreg_eval.figures.drawn import Drawing, Drawn
from vitreg_eval.figures.given import Given
from vitreg_eval.figures.plans import PLANS
from vitreg_eval.files import write_whole
from vitreg_eval.metrics import Metric
from vitreg_eval.paper import make_table
from vitreg_eval.plain import plain
from vitreg_eval.published_figures import PUBLISHED, Published
from vitreg_eval.results import DataRecord, ModelRecord, is_main_process, number, write_json

Tell = Callable[[str], None]


class FigureRecord(Config):
    """Everything that figure.json holds."""

    figure: str
    """Its name on the command line."""
    title: str
    """What it shows."""
    choice: str
    """How it is made where the papers leave it open."""
    models: dict[str, ModelRecord]
    """What was looked at, by the name that stands beside its numbers."""
    data: DataRecord | None
    """The images; None for figures without any."""
    metrics: dict[str, dict[str, Metric]]
    """Our numbers by model."""
    published: tuple[dict[str, Any], ...]
    """Theirs, of other weights and images."""
    missing: dict[str, str]
    """What could not be drawn, and why."""
    settings: dict[str, Any]
    """Options of the command."""
    versions: dict[str, str]
    """Of Python and of the packages that numbers depend on."""
    seed: int
    """Of scenes, probes and bootstrap."""
    commit: str | None
    """Of the checkout that vitreg ran from."""
    seconds: NonNegativeFloat
    """How long it took."""


def make(options: PaperOptions, tell: Tell) -> None:
    """Make a figure, a table, or all of them; `tell` gets a line for each step.

    Raises:
        InputError: nothing can be made, a model cannot be opened, or a folder cannot be written.
    """
    assert options.which is not None
    if options.which in TABLES:
        make_table(options, tell)
        return
    out = options.out or Path("runs", "paper", options.which)
    names = list(FIGURES) if options.which == ALL else [options.which]
    given = Given(options, out / "survey")
    missing: dict[str, str] = {}
    look(given, names)
    if is_main_process():
        for name in names:
            folder = out / name if options.which == ALL else out
            attempt(name, missing, partial(make_figure, name, given, folder, tell))
        shutil.rmtree(out / "survey", ignore_errors=True)
    if options.which == ALL:
        names += list(TABLES)
        for name in TABLES:
            attempt(name, missing, partial(make_one_table, name, options, out / name, tell))
    conclude(names, missing, out, tell)


def look(given: Given, names: Sequence[str]) -> None:
    """Let all processes look at the images; what cannot be looked at is told when it is drawn."""
    plans = [PLANS[name] for name in names]
    with suppress(InputError):
        if any(plan.looks_with_models for plan in plans):
            _ = given.exams
    with suppress(InputError):
        if any(plan.looks_with_snapshots for plan in plans):
            _ = given.histories


def attempt(name: str, missing: dict[str, str], make_it: Callable[[], None]) -> None:
    """Make something, or remember why it could not be made."""
    try:
        make_it()
    except InputError as error:
        missing[name] = str(error)


def make_one_table(name: str, options: PaperOptions, out: Path, tell: Tell) -> None:
    """One of the tables.

    Raises:
        InputError: no model or no data are given, or a model cannot be opened.
    """
    own = options.model_copy(update={"which": name, "out": out})
    if needed := own.needs():
        raise InputError(f"give {' and '.join(needed)}")
    make_table(own, tell)


def conclude(names: Sequence[str], missing: dict[str, str], out: Path, tell: Tell) -> None:
    """Tell what was not made; of several figures, write the list.

    Raises:
        InputError: nothing was made.
    """
    if len(missing) == len(names):
        raise InputError("; ".join(f"{name}: {why}" for name, why in missing.items()))
    for name, why in missing.items():
        tell(f"{name}: left out: {why}")
    if len(names) > 1 and is_main_process():
        rows = [[report.Cell(name), report.Cell(NAMES[name]), state(name, missing)] for name in names]
        table = report.Table(["figure or table", "what it shows", "where, or what is missing"], rows)
        page = report.Page("Figures and tables of the paper and the study", [], [report.Section("All", table=table)])
        report.write_page(page, out / "index.html")
        tell(f"{len(names) - len(missing)} of {len(names)} figures and tables made; the list is {out / 'index.html'}")


def state(name: str, missing: dict[str, str]) -> report.Cell:
    """Where a figure is, or what is missing."""
    page = "table.html" if name in TABLES else "figure.html"
    return report.Cell("missing", missing[name]) if name in missing else report.Cell(f"{name}/{page}")


def make_figure(name: str, given: Given, out: Path, tell: Tell) -> None:
    """Draw one figure and write pictures, arrays.json, figure.json and figure.html.

    Raises:
        InputError: there is nothing to draw, or the folder cannot be written.
    """
    started = time.perf_counter()
    torch.manual_seed(given.options.seed)
    drawn = PLANS[name].draw(given)
    drawn.missing.update(given.unreadable)
    made = record(name, drawn, given.options, time.perf_counter() - started)
    pictures = [save(one, out / f"{name}_{file_part(which)}.png") for which, one in drawn.pictures.items()]
    write_json(out / "arrays.json", plain(drawn.arrays))
    write_json(out / "figure.json", made.model_dump(mode="json"))
    report.write_page(page(made, pictures), out / "figure.html")
    tell(f"{name}: {len(pictures)} picture{'s' * (len(pictures) > 1)}; the page is {out / 'figure.html'}")
    for what, why in drawn.missing.items():
        tell(f"{name}: left out: {what}: {why}")


def save(drawing: Drawing, path: Path) -> report.Picture:
    """Write a picture as PNG, and give it for the page."""
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())
    return report.Picture(base64.b64encode(buffer.getvalue()).decode(), drawing.caption)


def file_part(words: str) -> str:
    """Words as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in words)


def record(name: str, drawn: Drawn, options: PaperOptions, seconds: float) -> FigureRecord:
    """The figure with everything it was made with."""
    plan = PUBLISHED[name]
    return FigureRecord(
        figure=name,
        title=FIGURES[name],
        choice=plan.choice,
        models=drawn.models,
        data=drawn.data,
        metrics=drawn.metrics,
        published=tuple(vars(one) for one in plan.published),
        missing=drawn.missing,
        settings=options.model_dump(mode="json", exclude={"which", "model", "out", "seed"}),
        versions=versions(),
        seed=options.seed,
        commit=commit(),
        seconds=round(seconds, 2),
    )


def page(made: FigureRecord, pictures: list[report.Picture]) -> report.Page:
    """The page of a figure."""
    sections = [
        report.Section("Ours", [images_line(made)] if made.data else [], figures=pictures),
        report.Section("Ours and published", table=comparison(made.metrics, PUBLISHED[made.figure].published)),
    ]
    if made.missing:
        sections.append(report.Section("Missing", [f"{what}: {why}" for what, why in made.missing.items()]))
    settings = made.model_dump(mode="json", exclude={"metrics", "published", "missing"})
    return report.Page(f"{made.figure}: {made.title}", [made.choice], [*sections, report.settings_section(settings)])


def images_line(made: FigureRecord) -> str:
    """What was looked at."""
    assert made.data is not None
    return f"{made.data.n} images of {made.data.name}."


def comparison(ours: dict[str, dict[str, Metric]], published: Sequence[Published]) -> report.Table:
    """Quantities in rows, our models in columns, published values at the end."""
    names = dict.fromkeys([*(one.quantity for one in published), *(name for own in ours.values() for name in own)])
    header = ["quantity", *ours, "published (other weights and images)"]
    rows = []
    for name in names:
        theirs = [one for one in published if one.quantity == name]
        cells = [our_cell(own.get(name)) for own in ours.values()]
        rows.append([report.Cell(name), *cells, published_cell(theirs)])
    return report.Table(header, rows)


def our_cell(metric: Metric | None) -> report.Cell:
    """A number of ours; of what needs no images, without their number."""
    return report.Cell(number(metric.value)) if metric is not None and metric.n == 0 else report.metric_cell(metric)


def published_cell(found: Sequence[Published]) -> report.Cell:
    """What was published of one quantity, and for which models."""
    values = [one.value if isinstance(one.value, str) else number(one.value) for one in found]
    return report.Cell("; ".join(values), "; ".join(one.of for one in found))
