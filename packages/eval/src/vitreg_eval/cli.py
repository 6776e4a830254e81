"""`vitreg-eval <task> [--option value ...]`: measure a model, print a table, write result.json."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vitreg_core.errors import InputError
from vitreg_core.options import one_line_errors, parse_options

from vitreg_eval.config import TaskOptions
from vitreg_eval.task import TASKS, Task, find

PROGRAM = "vitreg-eval"
DATASETS = {
    "scenes": "drawn on the fly, no files needed (all tasks but classify)",
    "voc07, voc12": "--data is the folder that holds VOCdevkit (lost)",
    "--data DIR": "train/<class>/ and val/<class>/ images (knn, linear); <class>/ images (classify)",
    "--images DIR": "photos without labels (doctor, norms, lost)",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with one_line_errors(PROGRAM):
        if not words or words[0] in {"-h", "--help"}:
            print(help_text())
        elif words[0] == "--version":
            from importlib.metadata import version

            print(f"{PROGRAM} {version('vitreg-eval')}")
        elif words[0] == "list":
            print(list_text())
        else:
            task = find(words[0])
            run_task(task, parse_options(task.options(), words[1:], f"{PROGRAM} {task.name}"))


def help_text() -> str:
    """What `vitreg-eval --help` prints."""
    tasks = "\n".join(f"  {task.name:9} {task.summary}" for task in TASKS.values())
    return f"""usage: {PROGRAM} <task> --model SOURCE [--option value ...]

Measures frozen vision transformers. A SOURCE is a folder or run folder with model.safetensors, a weights file, or a
preset such as vit_s16_reg4 (random weights). Each task prints a table and writes result.json below --out.

tasks:
{tasks}

  {PROGRAM} <task> --help   every option of a task
  {PROGRAM} list            tasks, data sets and presets
  {PROGRAM} --version

examples:
  {PROGRAM} doctor --images photos --model runs/x
  {PROGRAM} lost --dataset voc12 --data data/VOCdevkit --model runs/x
  {PROGRAM} knn --model runs/r0 --model runs/r4
  {PROGRAM} knn --model runs/elastic --registers 0,1,2,4,auto"""


def list_text() -> str:
    """What `vitreg-eval list` prints."""
    from vitreg_core.presets import list_models

    tasks = [f"  {task.name:9} {task.summary}" for task in TASKS.values()]
    data = [f"  {name:13} {what}" for name, what in DATASETS.items()]
    return "\n".join(["tasks", *tasks, "data", *data, "presets (random weights)", "  " + " ".join(list_models())])


def run_task(task: Task, options: TaskOptions) -> None:
    """Measure every model of the options."""
    if missing := options.needs():
        raise InputError(f"missing: {' and '.join(missing)}")
    from vitreg_core.weights import load_model

    out = options.out or Path("runs") / "eval" / task.name
    for source in options.model[1:]:
        load_model(source)  # so that a wrong one is named before minutes have passed
    for index, source in enumerate(options.model):
        measure_model(task, options, source, out if len(options.model) == 1 else out / f"{index}_{Path(source).name}")


def measure_model(task: Task, options: TaskOptions, source: str, out: Path) -> None:
    """Measure one model: table on stdout, result.json and pictures in `out`."""
    import torch
    from vitreg_core.weights import load_model

    from vitreg_eval.results import make_folder, result, table, write_json

    started = time.perf_counter()
    make_folder(out)
    torch.manual_seed(options.seed)
    model = load_model(source).to(device(options))
    if options.registers:
        from vitreg_eval.counts import measure_counts

        outcome = measure_counts(task, model, options, out)
    else:
        outcome = task.run(model, options, out)
    write_json(out / "result.json", result(task.name, model, outcome, options, time.perf_counter() - started))
    print(f"{task.name}: {model.source} on {outcome.data.name} {outcome.data.split} ({outcome.data.n} images)")
    print(table(outcome.metrics))
    for note in [*outcome.notes, f"result in {out / 'result.json'}"]:
        print(note)


def device(options: TaskOptions) -> str:
    """The device asked for, or the fastest there is.

    Raises:
        InputError: there is no such device.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if options.device is None:
        return next(name for name, found in there.items() if found)
    if not there[options.device]:
        raise InputError(f"--device {options.device}: there is none; give --device cpu, or leave it out")
    return options.device
