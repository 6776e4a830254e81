"""Tasks by name. This module imports no torch; a task's own module is imported when it runs."""

import importlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

from vitreg_core.config import nearest
from vitreg_core.errors import InputError

from vitreg_eval import config


class Task(NamedTuple):
    """A backbone in, named numbers out."""

    name: str
    options: type[config.TaskOptions]

    @property
    def summary(self) -> str:
        """One line on what it measures."""
        return (self.options.__doc__ or "").strip()

    @property
    def run(self) -> Callable:
        """`run(backbone, options, out) -> Outcome` of `vitreg_eval.tasks.<name>`."""
        return importlib.import_module(f"vitreg_eval.tasks.{self.name}").run

    @property
    def open_model(self) -> Callable:
        """`open_model(source)`: what it measures, a backbone or a dual encoder, in evaluation mode on the CPU."""
        dual = issubclass(self.options, config.DualOptions)
        return importlib.import_module("vitreg_eval.dual" if dual else "vitreg_eval.models").open_model


OPTIONS: dict[str, type[config.TaskOptions]] = {
    "doctor": config.DoctorOptions,
    "norms": config.NormsOptions,
    "lost": config.LostOptions,
    "knn": config.KnnOptions,
    "linear": config.LinearOptions,
    "logreg": config.LogregOptions,
    "segment": config.SegmentOptions,
    "depth": config.DepthOptions,
    "classify": config.ClassifyOptions,
    "embed": config.EmbedOptions,
    "tokens": config.TokensOptions,
    "zeroshot": config.ZeroshotOptions,
    "retrieval": config.RetrievalOptions,
}
TASKS = {name: Task(name, options) for name, options in OPTIONS.items()}


def find(name: str, known: Iterable[str] = ()) -> Task:
    """A task by name.

    Args:
        name: of the task.
        known: other words that may have been meant.

    Raises:
        InputError: no such task; names the nearest.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}{nearest(name, [*TASKS, *known])}; tasks are {', '.join(TASKS)}")
    return TASKS[name]
