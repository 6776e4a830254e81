"""What a task gives back, and result.json, which holds it with everything it was made with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitreg_core import whole
from vitreg_core.config import Config
from vitreg_core.errors import InputError
from vitreg_core.provenance import commit, versions
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights.files import weights_hash

from vitreg_eval.config import TaskOptions
from vitreg_eval.metrics import Metric


class DataRecord(Config):
    """Which images a number was measured on."""

    name: str
    """Data set, or folder."""
    split: str
    """Part of the data set."""
    n: int
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


def result(
    task: str, model: VisionTransformer, outcome: Outcome, options: TaskOptions, seconds: float
) -> dict[str, Any]:
    """Everything that result.json holds."""
    settings = options.model_dump(mode="json", exclude={"model", "out", "seed"})
    return {
        "task": task,
        "model": {"source": model.source, "hash": weights_hash(model)},
        "data": outcome.data.model_dump(),
        "settings": settings,
        "metrics": {name: metric.model_dump() for name, metric in outcome.metrics.items()},
        "notes": outcome.notes,
        "versions": versions(),
        "seed": options.seed,
        "commit": commit(),
        "seconds": round(seconds, 2),
    }


def write_json(path: Path, content: Mapping[str, Any] | list) -> None:
    """Write JSON, whole or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.write_json(path, content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another --out") from None


def make_folder(path: Path) -> None:
    """Make a folder for results.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}); give another --out") from None


def table(metrics: Mapping[str, Metric]) -> str:
    """Metrics as aligned text: name, value, 95 % interval, number of images."""
    rows = [("metric", "value", "95 % interval", "n")]
    rows += [(name, number(m.value), interval(m), str(m.n)) for name, m in metrics.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def interval(metric: Metric) -> str:
    """Interval of a metric; a dash where it has none."""
    return "-" if metric.ci95 is None else f"{number(metric.ci95[0])} to {number(metric.ci95[1])}"
