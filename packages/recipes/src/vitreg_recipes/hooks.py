"""What happens between steps: log, progress, checkpoints, a clean stop."""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from vitreg_core.errors import InputError

from vitreg_recipes.state import TrainState, save_checkpoint

Hook = Callable[[TrainState, Mapping[str, Tensor]], None]
"""Called after every step with the state and the metrics of the step."""
AGREE_EVERY = 10
"""Steps between the moments at which several processes agree on whether to stop."""
SPEAK_EVERY = 5.0
"""Seconds between progress lines where there is no terminal."""


@contextmanager
def standard_hooks(state: TrainState, extra: Iterable[Hook]) -> Iterator[list[Hook]]:
    """Yield the hooks of a run in the order of their calls: log, the caller's, save, stop, progress.

    The caller's come before the save, so that what they draw from the generators is part of the checkpoint.
    """
    log = Log(state)
    with Progress(state, log) as progress:
        if state.config.out is None:
            yield [log, *extra, progress]
        else:
            save = Save(state.config.out / "checkpoints")
            with Stop(save) as stop:
                yield [log, *extra, save, stop, progress]


class Log:
    """Every few steps, one line of `log.jsonl`: step, mean loss since the last line, learning rate, speed."""

    def __init__(self, state: TrainState) -> None:
        self.path = None if state.config.out is None else state.config.out / "log.jsonl"
        self.steps: list[Mapping[str, Tensor]] = []
        self.last: dict[str, float] = {}
        self.clock = time.perf_counter()
        if self.path is not None and state.accelerator.is_main_process:
            drop_lines(self.path, state.step)

    def __call__(self, state: TrainState, metrics: Mapping[str, Tensor]) -> None:
        """Collect metrics; where a line is due, check and write them.

        Raises:
            InputError: a metric is not finite; names the step.
        """
        self.steps.append(metrics)
        if state.step % state.config.log_every and state.step != state.config.steps:
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
            "step": state.step,
            **means,
            "lr": state.lr,
            "images_per_second": round(images / (now - self.clock), 1),
            "skipped_images": len(set(gather_object(sorted(state.data.skipped)))),
        }
        self.clock = now
        if self.path is not None and state.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(self.last) + "\n")


def drop_lines(path: Path, step: int) -> None:
    """Remove the lines past a step, which will be written again, and a line that was cut off."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def refuse_nan(state: TrainState, metrics: Mapping[str, list[float]]) -> None:
    """Stop at the first value that is not finite."""
    for name, values in metrics.items():
        for index, value in enumerate(values):
            if not math.isfinite(value):
                step, optim = state.step - len(values) + index + 1, state.config.optim
                raise InputError(
                    f"step {step}: {name} is {value}; lower optim.lr={optim.lr}, give a longer "
                    f"optim.warmup_steps={optim.warmup_steps}, or use precision=fp32"
                )


class Progress:
    """A bar where stderr is a terminal, else a line every few seconds."""

    def __init__(self, state: TrainState, log: Log) -> None:
        self.log = log
        self.main = state.accelerator.is_main_process
        self.spoken = time.perf_counter()
        total, shown = state.config.steps, self.main and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=state.step, unit="step", file=sys.stderr, disable=not shown)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()

    def __call__(self, state: TrainState, _metrics: Mapping[str, Tensor]) -> None:
        """Show how far the run is."""
        text = " ".join(f"{name} {value:.4g}" for name, value in self.log.last.items() if name != "step")
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.main and (time.perf_counter() - self.spoken > SPEAK_EVERY or state.step == state.config.steps):
            self.spoken = time.perf_counter()
            sys.stderr.write(f"step {state.step}/{state.config.steps} {text}".rstrip() + "\n")


class Save:
    """Checkpoints every few steps, and at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved = -1

    def __call__(self, state: TrainState, _metrics: Mapping[str, Tensor]) -> None:
        """Save where a checkpoint is due."""
        if state.step % state.config.save_every == 0 or state.step == state.config.steps:
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Save, unless this step is saved."""
        if self.saved != state.step:
            save_checkpoint(state, self.folder, keep_last=state.config.keep_last)
            self.saved = state.step


class Stop:
    """On SIGTERM or Ctrl-C, saves after the step under way and exits with 0. A second signal acts as it used to."""

    def __init__(self, save: Save) -> None:
        self.save = save
        self.asked = False
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # the only one that may handle signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.restore()

    def __call__(self, state: TrainState, _metrics: Mapping[str, Tensor]) -> None:
        """Save and exit if that was asked for."""
        if state.step < state.config.steps and self.agreed(state):
            self.save.save(state)
            if state.accelerator.is_main_process:
                saved = f"stopped at step {state.step} of {state.config.steps}, saved in {state.config.out}"
                tqdm.write(f"{saved}; give --resume to continue", file=sys.stderr)
            raise SystemExit(0)

    def agreed(self, state: TrainState) -> bool:
        """Whether any process was asked to stop; all give the same answer, at the same step."""
        if state.accelerator.num_processes == 1:
            return self.asked
        return state.step % AGREE_EVERY == 0 and any(gather_object([self.asked]))

    def ask(self, _number: int, _frame: FrameType | None) -> None:
        """Note the signal."""
        self.asked = True
        self.restore()

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.before = {}
