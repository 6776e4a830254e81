"""`vitreg-eval <command> [--option value ...]`: measure models, compare results, make the paper's tables."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import get_args

from vitreg_core.errors import InputError
from vitreg_core.options import one_line_errors, parse_options

from vitreg_eval.config import CompareOptions, TaskOptions
from vitreg_eval.config.datasets import DATASETS, HUB
from vitreg_eval.config.paper import NAMES, PaperOptions, names_text
from vitreg_eval.task import TASKS, Task, find

PROGRAM = "vitreg-eval"
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line and exit code 2, an interrupt with one line and 130."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with one_line_errors(PROGRAM):
        try:
            run(words)
        except KeyboardInterrupt:
            sys.stderr.write(f"{PROGRAM}: interrupted; what was finished is kept, and the same command goes on\n")
            sys.exit(INTERRUPTED)


def run(words: list[str]) -> None:
    """Run one command."""
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in COMMANDS:
        COMMANDS[name](rest)
    else:
        task = find(name, known=COMMANDS)
        run_task(task, parse_options(task.options(), rest, f"{PROGRAM} {task.name}"))


def print_help(words: list[str]) -> None:  # noqa: ARG001 (as every command)
    """Print what `vitreg-eval --help` prints."""
    print(f"""usage: {PROGRAM} <task> --model SOURCE [--option value ...]

Measures frozen vision transformers. A SOURCE is a folder or run folder with model.safetensors, a weights file,
hub:org/name, timm:NAME, transformers:ID, open_clip:ARCH[/TAG], an official name such as dinov2_vitb14_reg4, or a preset
such as vit_s16_reg4 (random weights). Each task prints a table and writes result.json below --out. --data is
$VITREG_DATA if not given.

tasks:
{task_lines()}

  {PROGRAM} <task> --help              every option of a task
  {PROGRAM} compare A B [C ...]        which differences between results exceed the noise
  {PROGRAM} paper NAME --model SOURCE [--images DIR] [--data DIR]
  {"":{len(PROGRAM)}}                            a figure or table of the paper or the study, beside published values
  {PROGRAM} list                       tasks, data sets and models
  {PROGRAM} --version

figures and tables (paper --help has a line for each):
{fill(" ".join(NAMES), 118, initial_indent="  ", subsequent_indent="  ")}

examples:
  {PROGRAM} doctor --images photos --model runs/x
  {PROGRAM} lost --dataset voc12 --data data/VOCdevkit --model runs/x
  {PROGRAM} knn --model runs/r0 --model runs/r4
  {PROGRAM} knn --model runs/elastic --registers 0,1,2,4,auto
  {PROGRAM} compare runs/eval/knn/0_r0 runs/eval/knn/1_r4
  {PROGRAM} paper fig7 --model runs/r0 --model runs/r4 --images photos
  {PROGRAM} paper table2a --model runs/r0 --model runs/r4 --data data""")


def task_lines() -> str:
    """The tasks, a line each."""
    return "\n".join(f"  {task.name:9} {task.summary}" for task in TASKS.values())


def print_version(words: list[str]) -> None:  # noqa: ARG001 (as every command)
    """Print name and version."""
    from importlib.metadata import version

    print(f"{PROGRAM} {version('vitreg-eval')}")


def print_list(words: list[str]) -> None:  # noqa: ARG001 (as every command)
    """Print tasks, data sets and models."""
    from vitreg_core.presets import list_models
    from vitreg_core.weights.official import OFFICIAL

    lines = ["tasks", task_lines(), *data_lines()]
    lines += ["official models", f"  {' '.join(OFFICIAL)}", "presets (random weights)", f"  {' '.join(list_models())}"]
    print("\n".join(lines))


def data_lines() -> list[str]:
    """What --dataset and --data take, a line each."""
    fixed = {task.name: dataset_names(task) for task in TASKS.values()}
    own = [f"  {name:13} {' '.join(names)}" for name, names in fixed.items() if names]
    free = " ".join(
        task.name for task in TASKS.values() if "dataset" in task.options.model_fields and not fixed[task.name]
    )
    labelled = [f"  {name:13} {layout}" for name, layout in DATASETS.items()]
    hub = f"  {HUB + 'ORG/NAME':13} a data set of the hub; without --dataset: train/<class>/, val/<class>/ below --data"
    return [
        "data by task (--dataset; --help of the task says more; scenes are drawn and need no files)",
        *own,
        f"labelled data ({free}): official layouts below --data",
        *labelled,
        hub,
    ]


def dataset_names(task: Task) -> tuple[str, ...]:
    """The data sets of a task that has a fixed choice of them."""
    field = task.options.model_fields.get("dataset")
    words = (
        [word for part in (field.annotation, *get_args(field.annotation)) for word in get_args(part)] if field else []
    )
    return tuple(dict.fromkeys(word for word in words if isinstance(word, str)))


def run_task(task: Task, options: TaskOptions) -> None:
    """Measure every model of the options."""
    refuse_missing(options.needs())
    out = options.out or Path("runs") / "eval" / task.name
    for source in options.model[1:]:
        task.open_model(source)  # so that a wrong one is named before minutes have passed
    for index, source in enumerate(options.model):
        run_model(task, options, source, out if len(options.model) == 1 else out / f"{index}_{Path(source).name}")


def refuse_missing(missing: list[str]) -> None:
    """Name what must still be given.

    Raises:
        InputError: something must.
    """
    if missing:
        raise InputError(f"missing: {' and '.join(missing)}")


def run_model(task: Task, options: TaskOptions, source: str, out: Path) -> None:
    """Measure one model: table on stdout, result.json and pictures in `out`; of several processes, the first prints."""
    from vitreg_eval.measuring import device, measure_model
    from vitreg_eval.results import RESULT, is_main_process, table

    found = measure_model(task, options, task.open_model(source).to(device(options)), out)
    if is_main_process():
        print(f"{task.name}: {found.model.source} on {found.data.name} {found.data.split} ({found.data.n} images)")
        if found.metrics:
            print(table(found.metrics))
        for note in [*found.notes, f"result in {out / RESULT}"]:
            print(note)


def run_compare(words: list[str]) -> None:
    """Compare the first result with each of the others; table on stdout, and compare.json."""
    options = parse_options(CompareOptions(), named("--results", words), f"{PROGRAM} compare A B [C ...]")
    refuse_missing(options.needs())
    from vitreg_eval.compare import compare
    from vitreg_eval.results import read_result, write_json

    first, *others = [read_result(Path(path)) for path in options.results]
    compared = [compare(first, other) for other in others]
    out = options.out if options.out.suffix == ".json" else options.out / "compare.json"
    write_json(out, {"comparisons": [one.record() for one in compared]})
    print("\n\n".join(one.text() for one in compared))
    print(f"comparison in {out}")


def run_paper(words: list[str]) -> None:
    """Make a figure or table of the paper or of the study; ours beside the published values."""
    if {"-h", "--help"} & set(words):
        print(f"figures and tables:\n{names_text()}\n")
    options = parse_options(PaperOptions(), named("--which", words), f"{PROGRAM} paper NAME")
    refuse_missing(options.needs())
    from vitreg_eval.figures.making import make
    from vitreg_eval.results import is_main_process

    def tell(line: str) -> None:
        if is_main_process():
            print(line, flush=True)

    make(options, tell)


def named(option: str, words: list[str]) -> list[str]:
    """A command line whose first words, up to the first option, are the values of one."""
    count = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    return [option, *words] if count else words


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "-h": print_help,
    "--help": print_help,
    "--version": print_version,
    "list": print_list,
    "compare": run_compare,
    "paper": run_paper,
}
