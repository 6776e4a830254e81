"""One model measured by one task, and its result written: what every command that measures does."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer

from vitreg_eval.config import TaskOptions
from vitreg_eval.models import Model
from vitreg_eval.results import Result, is_main_process, make_folder, result, write_result
from vitreg_eval.task import Task


def measure_model(task: Task, options: TaskOptions, model: Model, out: Path) -> Result:
    """Measure a model and write result.json into `out`; of several processes, the first writes.

    Raises:
        InputError: what the options name cannot be used, or the model lacks what the task reads.
    """
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    with own_folder(out) as folder:
        if options.registers:
            from vitreg_eval.counts import measure_counts

            outcome = measure_counts(task, with_registers(model), options, folder)
        else:
            outcome = task.run(model, options, folder)
    found = result(task.name, model, outcome, options, time.perf_counter() - started)
    if is_main_process():
        write_result(out, found)
    return found


@contextmanager
def own_folder(out: Path) -> Iterator[Path]:
    """The folder for what a task draws: `out`, or for processes other than the first one that is thrown away."""
    if is_main_process():
        make_folder(out)
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def with_registers(model: Model) -> VisionTransformer:
    """A model whose registers can be left out.

    Raises:
        InputError: a model in the class of another library.
    """
    if not isinstance(model, VisionTransformer):
        raise InputError(f"--registers: {model.source} runs in the class of its own library; leave it out")
    return model


def device(options: TaskOptions) -> str:
    """The device asked for, or the fastest there is; of several processes each has its own.

    Raises:
        InputError: there is no such device.
    """
    there: dict[str, bool] = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if options.device is not None and not there[options.device]:
        raise InputError(f"--device {options.device}: there is none; give --device cpu, or leave it out")
    fastest = next(name for name, found in there.items() if found)
    chosen: str = options.device or fastest
    if chosen != "cuda" or "LOCAL_RANK" not in os.environ:
        return chosen
    local = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    torch.cuda.set_device(local)
    return f"cuda:{local}"
