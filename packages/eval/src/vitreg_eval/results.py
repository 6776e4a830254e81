"""What a task gives back, and result.json, which holds it with everything it was made with."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from vitreg_core import whole
from vitreg_core.config import Config
from vitreg_core.errors import InputError
from vitreg_core.provenance import commit, versions
from vitreg_core.weights.files import weights_hash

from vitreg_eval.config import TaskOptions
from vitreg_eval.metrics import Metric, middle
from vitreg_eval.models import Model

RESULT = "result.json"
RESAMPLES = "resamples.safetensors"
"""Beside result.json: of every metric, its value on each resample of the images, for comparisons in pairs."""
LARGEST = 2**26
"""Bytes of a result.json that are read."""


class ModelRecord(Config):
    """Which model a number belongs to."""

    source: str
    """Where it was loaded from."""
    hash: str
    """SHA-256 over names and values of all tensors."""


class DataRecord(Config):
    """Which images a number was measured on."""

    name: str
    """Data set, or folder."""
    split: str
    """Part of the data set."""
    n: NonNegativeInt
    """Images."""
    hash: str
    """SHA-256 over what fixes the images: file names and sizes, or the seed of drawn ones."""


@dataclass(frozen=True)
class Outcome:
    """What a task found."""

    metrics: dict[str, Metric]
    """Named numbers."""
    data: DataRecord
    """What they were measured on."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the reader: a verdict, what to do, which files were written."""


class Result(Config):
    """Everything that result.json holds."""

    task: str
    """Name of the task."""
    model: ModelRecord
    """What was measured."""
    data: DataRecord
    """On what."""
    settings: dict[str, Any]
    """Options of the task, other than model, folder and seed."""
    metrics: dict[str, Metric]
    """Named numbers."""
    notes: tuple[str, ...] = ()
    """Sentences for the reader."""
    versions: dict[str, str]
    """Of Python and of the packages that numbers depend on."""
    seed: NonNegativeInt
    """Of drawn scenes, heads and bootstrap."""
    commit: str | None
    """Of the checkout that vitreg ran from."""
    seconds: NonNegativeFloat
    """How long it took."""


def result(task: str, model: Model, outcome: Outcome, options: TaskOptions, seconds: float) -> Result:
    """Join an outcome with everything it was made with."""
    return Result(
        task=task,
        model=ModelRecord(source=model.source, hash=weights_hash(model)),
        data=outcome.data,
        settings=settings(options),
        metrics=outcome.metrics,
        notes=tuple(outcome.notes),
        versions=versions(),
        seed=options.seed,
        commit=commit(),
        seconds=round(seconds, 2),
    )


def settings(options: TaskOptions) -> dict[str, Any]:
    """What of a task's options stands in result.json: all but what has a place of its own there."""
    return options.model_dump(mode="json", exclude={"model", "out", "seed"})


def write_result(folder: Path, found: Result) -> None:
    """Write result.json, and beside it the resamples of its metrics; each file whole or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    drawn = {name: metric.resamples for name, metric in found.metrics.items() if metric.resamples}
    content = save({name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in drawn.items()})
    temporary = folder / f".{RESAMPLES}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if drawn:
            temporary.write_bytes(content)
            temporary.replace(folder / RESAMPLES)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(folder / RESAMPLES, error) from None
    write_json(folder / RESULT, found.model_dump(mode="json"))


def read_result(path: Path) -> Result:
    """Read a result.json, given itself or its folder, with the resamples beside it.

    Resamples that do not give the intervals of result.json, as after a kill between the two files, are left out.

    Raises:
        InputError: there is none, or it is not what a task writes.
    """
    file = path / RESULT if path.is_dir() else path
    try:
        if file.stat().st_size > LARGEST:
            raise InputError(f"{file}: {file.stat().st_size} bytes are too many for a result; give a {RESULT}")
        found = Result.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); give a {RESULT}, or the folder of one") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        reason = f"{where}: {' '.join(first['msg'].split())}"
        raise InputError(f"{file}: not the result of a task ({reason}); give a {RESULT} of vitreg-eval") from None
    return with_resamples(found, file.parent / RESAMPLES)


def with_resamples(found: Result, file: Path) -> Result:
    """A result with the resamples of a file, where there is one and it belongs to the result."""
    try:
        drawn = load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError):
        return found
    metrics = {name: with_numbers(metric, drawn.get(name)) for name, metric in found.metrics.items()}
    return found.model_copy(update={"metrics": metrics})


def with_numbers(metric: Metric, numbers: torch.Tensor | None) -> Metric:
    """A metric with its resamples, if they are what its interval was made of."""
    if metric.ci95 is None or numbers is None or numbers.dtype != torch.float64 or numbers.shape == (0,):
        return metric
    ends = torch.tensor([middle(numbers.flatten()), metric.ci95], dtype=torch.float64)
    if not torch.allclose(ends[0], ends[1], rtol=1e-9, atol=1e-12):
        return metric
    return metric.model_copy(update={"resamples": tuple(numbers.flatten().tolist())})


def write_json(path: Path, content: Mapping[str, Any] | list) -> None:
    """Write JSON, whole or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.write_json(path, content)
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> InputError:
    """What to tell when a file cannot be written."""
    return InputError(f"{path}: cannot be written ({error.strerror}); give another --out")


def make_folder(path: Path) -> None:
    """Make a folder for results.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}); give another --out") from None


def is_main_process() -> bool:
    """Whether this process prints and writes: the first of those that a launcher has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def table(metrics: Mapping[str, Metric]) -> str:
    """Metrics as aligned text: name, value, 95 % interval, number of images, and the note where one has one."""
    rows = [("metric", "value", "95 % interval", "n", "")]
    rows += [(name, number(m.value), interval(m), str(m.n), m.note) for name, m in metrics.items()]
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text in columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def interval(metric: Metric) -> str:
    """Interval of a metric; a dash where it has none."""
    return "-" if metric.ci95 is None else f"{number(metric.ci95[0])} to {number(metric.ci95[1])}"
