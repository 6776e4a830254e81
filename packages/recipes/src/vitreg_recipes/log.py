"""What a run tells of itself while it trains: a line of the log, and a line on the screen."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from vitreg_core.errors import InputError

from vitreg_recipes.lines import Lines
from vitreg_recipes.state import TrainState

SPEAK_EVERY = 5.0
"""Seconds between progress lines where there is no terminal."""


class Log:
    """Every few steps, one line of `log.jsonl`: means since the last line, learning rate, speed, waiting for data."""

    def __init__(self, state: TrainState) -> None:
        self.lines = Lines(state, "log.jsonl")
        self.steps: list[Mapping[str, Tensor]] = []
        self.last: dict[str, float] = {}
        """The newest line."""
        self.clock = time.perf_counter()
        self.waited = state.data_seconds

    def __call__(self, state: TrainState, metrics: Mapping[str, Tensor]) -> None:
        """Collect metrics; where a line is due, check and write them.

        Raises:
            InputError: a metric is not finite; names the step.
        """
        self.steps.append(metrics)
        if state.step % state.config.log_every and state.step != state.steps:
            return
        table = {name: torch.stack([step[name] for step in self.steps]).float() for name in metrics}
        means = {name: state.accelerator.reduce(values, "mean").tolist() for name, values in table.items()}
        refuse_nan(state, means)
        self.write(state, {name: sum(values) / len(values) for name, values in means.items()})
        self.steps.clear()

    def write(self, state: TrainState, means: dict[str, float]) -> None:
        """Write one line."""
        now = time.perf_counter()
        images = len(self.steps) * state.config.data.batch_size
        self.last = {
            **means,
            "lr": state.lr,
            "images_per_second": round(images / (now - self.clock), 1),
            "data_wait": round((state.data_seconds - self.waited) / (now - self.clock), 3),
            "skipped_images": len(set(gather_object(sorted(state.data.skipped)))),
        }
        self.clock, self.waited = now, state.data_seconds
        self.lines.write(state, self.last)


def refuse_nan(state: TrainState, metrics: Mapping[str, list[float]]) -> None:
    """Stop at the first value that is not finite."""
    for name, values in metrics.items():
        for index, value in enumerate(values):
            if not math.isfinite(value):
                at = state.step - len(values) + index + 1
                raise InputError(f"step {at}: {name} is {value}; {state.config.rates}")


@runtime_checkable
class Source(Protocol):
    """What a progress line shows."""

    last: dict[str, float]


class Progress:
    """A bar where stderr is a terminal, else a line every few seconds."""

    def __init__(self, state: TrainState, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.main = state.accelerator.is_main_process
        self.spoken = time.perf_counter()
        total, shown = state.steps, self.main and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=state.step, unit="step", file=sys.stderr, disable=not shown)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()

    def __call__(self, state: TrainState, _metrics: Mapping[str, Tensor]) -> None:
        """Show how far the run is."""
        text = " ".join(f"{name} {value:.4g}" for source in self.sources for name, value in source.last.items())
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.main and (time.perf_counter() - self.spoken > SPEAK_EVERY or state.step == state.steps):
            self.spoken = time.perf_counter()
            sys.stderr.write(f"step {state.step}/{state.steps} {text}".rstrip() + "\n")
