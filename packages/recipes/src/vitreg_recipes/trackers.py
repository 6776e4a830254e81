"""Trackers of other projects, beside our own log: tensorboard, wandb, trackio, through Accelerate."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vitreg_core.errors import InputError

from vitreg_recipes.config import RunConfig, flatten
from vitreg_recipes.state import TrainState

PROJECT = "vitreg"


def check_trackers(config: RunConfig) -> None:
    """Refuse trackers that would stay silent; Accelerate leaves out a missing package without a word.

    Raises:
        InputError: a package is not installed, or there is no folder for what it writes.
    """
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"trackers={name}: not installed; pip install {name}, or leave it out")
        if config.out is None:
            raise InputError(f"trackers={name} without a run folder; give --out")


@contextmanager
def open_trackers(state: TrainState) -> Iterator[None]:
    """Tell the trackers of the config, and close them at the end, however it comes."""
    out = state.config.out
    if state.config.trackers and out is not None:
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": state.step},
            "wandb": {"name": out.name, "dir": str(out)},
            "trackio": {"name": out.name},
        }
        state.accelerator.init_trackers(PROJECT, plain(state.config), options)
    try:
        yield
    finally:
        for tracker in state.accelerator.trackers:
            tracker.finish()  # not end_training, which would also part the processes


def plain(config: RunConfig) -> dict[str, Any]:
    """The config as the trackers take it: dotted names, and numbers or texts alone."""
    values = flatten(config.model_dump(mode="json"))
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in values}
