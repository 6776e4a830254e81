"""Named runs: each is a function that returns a config."""

import inspect
from collections.abc import Callable

from vitreg_core.config import nearest
from vitreg_core.errors import InputError

from vitreg_recipes.config import TrainConfig
from vitreg_recipes.runs import deit3

RUNS: dict[str, Callable[[], TrainConfig]] = {run.__name__: run for run in (deit3.deit3_scenes,)}


def find(name: str) -> TrainConfig:
    """Config of a run.

    Raises:
        InputError: no such run; names the nearest one.
    """
    if name not in RUNS:
        raise InputError(f"unknown run {name!r}{nearest(name, RUNS)}; runs are {', '.join(RUNS)}")
    return RUNS[name]()


def list_runs() -> dict[str, str]:
    """Names of the runs, with a line on each."""
    return {name: (inspect.getdoc(run) or "").split("\n")[0] for name, run in RUNS.items()}
