"""What a remedy does to a model: the same tasks on the same data before and after, and the time that it costs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_core.precision import use_precision

from vitreg_eval.compare import Comparison, compare
from vitreg_eval.config import DoctorOptions, TaskOptions
from vitreg_eval.exam import Exam
from vitreg_eval.measuring import measure_model
from vitreg_eval.task import TASKS

CHOSEN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lost", {"dataset": "voc12", "features": "keys"}),
    ("lost", {"dataset": "voc12", "features": "values"}),
    ("segment", {"dataset": "masks", "ignore_zero": True, "crop": 224}),
    ("knn", {}),
    ("classify", {}),
)
"""Tasks and their options besides the data. Which facet LOST should read depends on the model, as in the paper."""
ROUNDS = 7
TIMED = 16
"""Images of a timed pass, at most."""


@dataclass(frozen=True)
class Effects:
    """Two models, measured on the same data."""

    compared: list[Comparison]
    """A task each; the first model is the one before."""
    time_ratio: float
    """Median time of a forward pass after over before, in turn."""
    missing: dict[str, str]
    """Tasks that a model or the data do not allow, and why."""


def effects(before: Exam, after: Exam, options: DoctorOptions, out: Path) -> Effects:
    """Run every task whose data are given on both models, each into a folder of its own below `out`."""
    compared, missing = [], {}
    for task, chosen in CHOSEN:
        if getattr(options, task) is None:
            continue
        name = " ".join((task, *(chosen[field] for field in ("features",) if field in chosen)))
        try:
            compared.append(run_both(task, chosen, (before, after), options, out / name.replace(" ", "_")))
        except InputError as error:
            missing[name] = str(error)
    return Effects(compared, time_ratio(before, after), missing)


def run_both(
    task: str, extra: dict[str, Any], exams: tuple[Exam, Exam], options: DoctorOptions, out: Path
) -> Comparison:
    """One task on both models.

    Raises:
        InputError: a model or the data do not allow it.
    """
    shared = {field: getattr(options, field) for field in ("device", "precision", "seed")}
    chosen = {"model": ("-",), "data": getattr(options, task), **extra, **shared}
    built: TaskOptions = override(TASKS[task].options(), chosen)
    built.needs()
    first, other = (measure_model(TASKS[task], built, one.model, out / one.name) for one in exams)
    return compare(first, other)


@torch.no_grad()
def time_ratio(before: Exam, after: Exam) -> float:
    """Median ratio of the times of passes that take turns."""
    images = before.sample.images[:TIMED].to(before.model.device)

    def seconds(exam: Exam) -> float:
        if images.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        with use_precision(exam.options.precision, exam.model.device):
            exam.model.features(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    pairs: Sequence[tuple[float, float]] = [(seconds(before), seconds(after)) for _ in range(ROUNDS + 1)]
    return median(later / earlier for earlier, later in pairs[1:])
