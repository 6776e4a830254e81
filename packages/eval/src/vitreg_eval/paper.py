"""A table of the paper on one's own models: what is missing is listed, what is done is kept, ours beside the published.

Every number is an ordinary run of a task in a folder of its own, with its result.json. A run is done when that file has
the weights, the data and the settings at hand.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_core.weights.files import weights_hash
from vitreg_core.whole import write_text

from vitreg_eval import report
from vitreg_eval.compare import counts
from vitreg_eval.config import SegmentOptions, TaskOptions
from vitreg_eval.config.paper import PaperOptions
from vitreg_eval.data_records import data_record
from vitreg_eval.measuring import device, measure_model
from vitreg_eval.metrics import Metric
from vitreg_eval.models import Model
from vitreg_eval.paths import data_folder
from vitreg_eval.published import PAPER_TABLES, Column, PaperTable
from vitreg_eval.results import (
    RESULT,
    DataRecord,
    Result,
    interval,
    is_main_process,
    number,
    read_result,
    settings,
    unwritable,
    write_json,
)
from vitreg_eval.task import TASKS

Options = TypeVar("Options", bound=TaskOptions)
PASSED_ON = ("precision", "batch_size", "seed", "cache", "protocol", "steps", "features", "device")
"""Options that the tasks get, where they have them."""


@dataclass(frozen=True)
class Measured:
    """One model on one data set: a result, or why there is none."""

    column: Column
    result: Result | None
    missing: str = ""


@dataclass(frozen=True)
class Row:
    """One row of ours."""

    model: str
    kind: str
    cells: list[Measured]

    @property
    def name(self) -> str:
        """What stands in front of the row."""
        return f"{self.model}, {self.kind} token" if self.kind else self.model

    def metric(self, cell: Measured) -> Metric | None:
        """The number of a cell; none where it could not be measured."""
        name = f"{self.kind}_{cell.column.metric}" if self.kind else cell.column.metric
        return cell.result.metrics.get(name) if cell.result else None


def make_table(options: PaperOptions, tell: Callable[[str], None]) -> list[Row]:
    """Measure what a table needs, and write table.md, .json, .csv and .html; `tell` gets a line for each step.

    Raises:
        InputError: a model that cannot be opened, or a folder that cannot be written.
    """
    assert options.which is not None
    plan = PAPER_TABLES[options.which]
    data_folder(options.data)
    out = options.out or Path("runs", "paper", options.which)
    open_model = opener(plan)
    for source in options.model[1:]:
        open_model(source)  # so that a wrong one is named before hours have passed
    rows = []
    for index, source in enumerate(options.model):
        model = open_model(source).to(device(options_of(TaskOptions(), options)))
        cells = [fill(model, column, options, out / f"{index}_{Path(source).name}", tell) for column in plan.columns]
        rows += [Row(source, kind, cells) for kind in plan.kinds]
    if is_main_process():
        write(plan, rows, out)
    tell(markdown(plan, rows))
    tell(f"table in {out / 'table.md'}, .csv, .json and .html")
    return rows


def opener(plan: PaperTable) -> Callable[[str], Model]:
    """What opens the models of a table, all of whose columns read the same kind of model."""
    return TASKS[plan.columns[0].task].open_model


def fill(model: Model, column: Column, options: PaperOptions, folder: Path, tell: Callable[[str], None]) -> Measured:
    """Measure a model on the data set of a column, unless that is done or something is missing."""
    where = folder / f"{column.task}_{column.dataset}"
    what = f"{model.source}: {column.title}"
    try:
        task_options = build(column, options)
        data = data_record(column.task, task_options, model)
        found = finished(model, column, task_options, data, where)
        if found:
            tell(f"{what}: done before, in {where / RESULT}")
        else:
            tell(f"{what}: {column.task} on {column.dataset}")
            found = measure_model(TASKS[column.task], task_options, model, where)
    except InputError as error:
        tell(f"{what}: left out, see below")
        return Measured(column, None, str(error))
    return Measured(column, found)


def build(column: Column, options: PaperOptions) -> TaskOptions:
    """Options of the task that measures a column.

    Raises:
        InputError: the task is not there, or cannot do what is asked.
    """
    if column.task not in TASKS:
        raise InputError(f"there is no task {column.task}")
    task = TASKS[column.task]
    chosen = {"model": ("-",), "dataset": column.dataset, "data": data_folder(options.data) / column.folder}
    known = {name: value for name, value in {**chosen, **column.options}.items() if name in task.options.model_fields}
    built = options_of(override(task.options(), known), options)
    if missing := built.needs():
        raise InputError(f"missing: {' and '.join(missing)}")
    return built


def options_of(built: Options, options: PaperOptions) -> Options:
    """Options of a task with those of the table that it has; what heads train on at a step is that of the protocol."""
    names = {name for name in PASSED_ON if name in type(built).model_fields}
    names -= {"batch_size"} if isinstance(built, SegmentOptions) else set()
    given = {name: getattr(options, name) for name in names}
    return override(built, {name: value for name, value in given.items() if value is not None})


def finished(
    model: Model, column: Column, options: TaskOptions, data: DataRecord | None, folder: Path
) -> Result | None:
    """The result of an earlier run with the same weights, data and settings."""
    try:
        found = read_result(folder)
    except InputError:  # none, or damaged: measured again
        return None
    same = (found.task, found.model.hash, found.seed) == (column.task, weights_hash(model), options.seed)
    before, now = (kept(column.task, given) for given in (found.settings, settings(options)))
    return found if same and found.data == data and before == now else None


def kept(task: str, given: dict[str, Any]) -> dict[str, Any]:
    """Settings that change the numbers of a task."""
    return {name: value for name, value in given.items() if counts(task, name)}


def reasons(plan: PaperTable, cell: Measured) -> str:
    """Why a published value does not stand for the same as ours; empty where data and protocol are the same."""
    if cell.result is None:
        return ""
    found = []
    if cell.result.data.n != cell.column.images or "(class folders)" in cell.result.data.name:
        found.append(f"other data ({cell.result.data.n} images)")
    if not plan.known or cell.result.settings.get("protocol", "dinov2") != "dinov2" or own_steps(cell.result):
        found.append("other protocol")
    return ", ".join(found)


def own_steps(found: Result) -> bool:
    """Whether heads were trained for another number of steps than the protocol's."""
    task = TASKS[found.task].options()
    return found.settings.get("steps") != settings(task).get("steps")


def published_marks(plan: PaperTable, rows: list[Row]) -> list[str]:
    """What stands with the published value of each column, besides that its models are others."""
    columns = zip(*(row.cells for row in rows), strict=True)
    marks = [{reasons(plan, cell) for cell in cells} - {""} for cells in columns]
    return ["; ".join(sorted(mark)) for mark in marks]


def write(plan: PaperTable, rows: list[Row], out: Path) -> None:
    """Write the table in every form."""
    write_json(out / "table.json", record(plan, rows))
    report.write_page(page(plan, rows), out / "table.html")
    try:
        write_text(out / "table.md", markdown(plan, rows) + "\n")
        write_text(out / "table.csv", comma_separated(plan, rows))
    except OSError as error:
        raise unwritable(out / "table.md", error) from None


def record(plan: PaperTable, rows: list[Row]) -> dict[str, Any]:
    """The table as JSON."""
    ours = [
        {
            "model": row.model,
            "kind": row.kind,
            "column": cell.column.title,
            "dataset": cell.column.dataset,
            "metric": found.model_dump(mode="json") if (found := row.metric(cell)) else None,
            "missing": cell.missing,
            "differs_from_published": reasons(plan, cell),
        }
        for row in rows
        for cell in row.cells
    ]
    columns = [column.title for column in plan.columns]
    theirs = [
        {"model": model, "column": column, "value": value}
        for model, values in plan.rows.items()
        for column, value in zip(columns, values, strict=True)
    ]
    return {"title": plan.title, "protocol": plan.protocol, "ours": ours, "published": theirs}


def grid(plan: PaperTable, rows: list[Row]) -> list[list[report.Cell]]:
    """Cells of the table below its header: ours first, then the published ones with what tells them apart."""
    marks = published_marks(plan, rows)
    ours = [[report.Cell(row.name), *(our_cell(row, cell) for cell in row.cells)] for row in rows]
    theirs = [
        [report.Cell(f"{plan.source}: {model}", "other weights"), *map(published_cell, values, marks)]
        for model, values in plan.rows.items()
    ]
    return [*ours, *theirs]


def published_cell(value: float | None, mark: str) -> report.Cell:
    """A published number, with what it differs in from ours besides the weights; a dash where none is given."""
    return report.Cell("-", "not given") if value is None else report.Cell(number(value), mark)


def our_cell(row: Row, cell: Measured) -> report.Cell:
    """A number of ours with its interval; a dash where there is none."""
    found = row.metric(cell)
    if found is None:
        return report.Cell("-", "missing" if cell.result is None else "not measured")
    note = f", {found.note}" if found.note else ""
    return report.Cell(number(found.value), f"{interval(found)}, n={found.n}{note}")


def missing_lines(rows: list[Row]) -> list[str]:
    """What could not be measured and why; once where it is the same for several models."""
    models: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for cell in row.cells:
            if cell.missing:
                models.setdefault((cell.column.title, cell.missing), []).append(row.model)
    everyone = {row.model for row in rows}
    return [
        f"{title}: {why}" if set(names) == everyone else f"{title}, {', '.join(dict.fromkeys(names))}: {why}"
        for (title, why), names in models.items()
    ]


def markdown(plan: PaperTable, rows: list[Row]) -> str:
    """The table as Markdown."""
    lines = [f"# {plan.title}", "", plan.protocol, ""]
    lines += ["| model | " + " | ".join(column.title for column in plan.columns) + " |"]
    lines += ["| --- " * (len(plan.columns) + 1) + "|"]
    for cells in grid(plan, rows):
        lines.append("| " + " | ".join(f"{c.text} ({c.note})" if c.note else c.text for c in cells) + " |")
    if missing := missing_lines(rows):
        lines += ["", "Missing:", "", *(f"- {line}" for line in missing)]
    return "\n".join(lines)


def comma_separated(plan: PaperTable, rows: list[Row]) -> str:
    """The table as CSV: a line for each number, ours and published."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "kind", "column", "value", "low", "high", "n", "published", "remark"])
    for row in rows:
        for cell in row.cells:
            found = row.metric(cell)
            ends = (found.ci95 or ("", "")) if found else ("", "")
            numbers = [found.value, *ends, found.n] if found else ["", "", "", ""]
            remark = cell.missing or reasons(plan, cell)
            writer.writerow([row.model, row.kind, cell.column.title, *numbers, "no", remark])
    for model, values in plan.rows.items():
        for column, value in zip(plan.columns, values, strict=True):
            writer.writerow([model, "", column.title, value, "", "", column.images, "yes", ""])
    return text.getvalue()


def page(plan: PaperTable, rows: list[Row]) -> report.Page:
    """The table as an HTML page."""
    table = report.Table(["model", *(column.title for column in plan.columns)], grid(plan, rows))
    done = [cell.result.model_dump(mode="json") for row in rows for cell in row.cells if cell.result]
    sections = [report.Section("Ours and published", missing_lines(rows), table)]
    return report.Page(plan.title, [plan.protocol], [*sections, report.settings_section({"results": done})])
