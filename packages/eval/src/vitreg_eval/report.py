"""One self-contained HTML page: tables with intervals, figures, settings. It loads nothing from anywhere."""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from vitreg_core.errors import InputError
from vitreg_core.whole import write_text

from vitreg_eval.metrics import Metric
from vitreg_eval.results import interval, number


@dataclass(frozen=True)
class Cell:
    """One cell of a table, with a small second line."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header."""

    header: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Picture:
    """A figure, already drawn."""

    png: str
    caption: str


@dataclass(frozen=True)
class Step:
    """Something to do, and how."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with text, and whatever belongs to it."""

    title: str
    text: list[str] = field(default_factory=list)
    table: Table | None = None
    figures: list[Picture] = field(default_factory=list)
    settings: str = ""
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    lead: list[str]
    sections: list[Section]


def picture(figure: Figure, caption: str) -> Picture:
    """Draw a figure into the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Picture(base64.b64encode(buffer.getvalue()).decode(), caption)


def metric_cell(metric: Metric | None) -> Cell:
    """Value, with its interval and number of images below; a dash where there is none."""
    if metric is None:
        return Cell("–")  # noqa: RUF001 (a dash)
    return Cell(number(metric.value), f"{interval(metric)} (n={metric.n})")


def comparison(results: Mapping[str, Mapping[str, Metric]], published: Mapping[str, tuple[str, str, str]]) -> Table:
    """Metrics in rows, models in columns, and published values beside them, marked as other data.

    Args:
        results: metrics of each model.
        published: for a metric, what was measured, its value without and with registers.
    """
    names = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
    header = ["metric", *results, *["paper: without, with registers (other data)"] * bool(published)]
    rows = []
    for name in names:
        what, without, with_registers = published.get(name, ("", "", ""))
        theirs = Cell(f"{without}, {with_registers}", what) if what else Cell("")
        ours = [metric_cell(metrics.get(name)) for metrics in results.values()]
        rows.append([Cell(name), *ours, *[theirs] * bool(published)])
    return Table(header, rows)


def settings_section(settings: Mapping[str, Any]) -> Section:
    """Everything that the page was made with."""
    return Section("Every setting", settings=json.dumps(settings, indent=2))


def apart(first: Metric, second: Metric) -> bool:
    """Whether the 95 % intervals of two metrics do not overlap."""
    if first.ci95 is None or second.ci95 is None:
        return False
    return first.ci95[1] < second.ci95[0] or second.ci95[1] < first.ci95[0]


def write_page(page: Page, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    template = Environment(loader=PackageLoader("vitreg_eval", "."), autoescape=True).get_template("report.html.j2")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, template.render(page=page))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another --out") from None
