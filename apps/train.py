"""Train a run: `accelerate launch apps/train.py deit3_scenes --model.registers 4 --out runs/reg4`.

Without arguments it lists the runs; `apps/train.py <run> --help` lists the options of one. `--config FILE` reads
options from a YAML file, such as `--print-config` prints.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, create_model
from vitreg_core.errors import InputError
from vitreg_core.options import one_line_errors, parse_options, split_arguments
from vitreg_recipes.config import SCENES, RunConfig, TrainConfig
from vitreg_recipes.runs import find, list_runs

if TYPE_CHECKING:
    from vitreg_recipes.measure import Evaluation

PROGRAM = "train.py"
WITH_INIT = ("model.image_size", "model.drop_path", "model.registers")
"""Options on the model that go with --init; the rest comes with the weights."""
SNIPPET = """\
from pathlib import Path
import json
from vitreg_core import load_model
from vitreg_core.data.images import read_image

model = load_model({out!r})
classes = json.loads(Path({out!r}, "classes.json").read_text())
image = model.preprocess(read_image(Path({photo!r})))
print(classes[model.classify(image[None]).argmax()])"""


def with_resume(kind: type[RunConfig]) -> type[RunConfig]:
    """The options of a kind of run: its config, and whether to continue."""
    resume = Field(default=False, description="Continue the run in --out from its newest checkpoint.")
    return create_model("Options", __base__=kind, __doc__=kind.__doc__, resume=(bool, resume))


def parse(name: str, arguments: list[str]) -> tuple[RunConfig, bool]:
    """Config of a run with the options of a file and the command line, and whether to continue it.

    `out` is runs/<name> unless they say otherwise.

    Raises:
        InputError: an option that cannot be used.
    """
    named = find(name)
    default = with_resume(type(named))(**{**named.model_dump(), "out": Path("runs", name)})
    options = parse_options(default, arguments, f"{PROGRAM} {name}")
    fixed = (given for given, _ in split_arguments(arguments) if given.startswith("model.") and given not in WITH_INIT)
    if options.init is not None and (field := next(fixed, None)):
        raise InputError(
            f"option --{field} with init={options.init}: it comes with the weights; leave it out (free are "
            f"{', '.join(WITH_INIT)})"
        )
    values = options.model_dump()
    return type(named)(**{name: value for name, value in values.items() if name != "resume"}), values["resume"]


def print_runs() -> None:
    """List the runs, and how to start one."""
    print("usage: accelerate launch apps/train.py RUN [--option value ...] [--resume]; RUN --help lists the options")
    print("RUN_regN is RUN with N registers, such as deit3_b16_reg4\n")
    for name, line in list_runs().items():
        print(f"{name}  {line}")


def use_all_cores() -> None:
    """`accelerate launch` gives a lone process one CPU thread unless told a number; without a GPU it needs them all.

    Threads spin for a moment only, then wait asleep; longer spinning ones slow training several times on busy ones.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # which OpenMP reads as torch loads
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # some microseconds: measured as fast as spinning on free cores
    import torch

    alone = os.environ.get("WORLD_SIZE", "1") == "1" and not torch.cuda.is_available()
    if alone and "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def resume_command(arguments: list[str], environment: Mapping[str, str]) -> str:
    """The command that continues this run on this machine, by the launcher that the environment tells of."""
    processes, local = int(environment.get("WORLD_SIZE", "1")), environment.get("LOCAL_WORLD_SIZE", "1")
    words = [sys.argv[0], *(word for word in arguments if word != "--resume"), "--resume"]
    if "ACCELERATE_MIXED_PRECISION" in environment:  # which accelerate launch sets
        launcher = ["accelerate", "launch", *(["--num_processes", str(processes)] if processes > 1 else [])]
    elif processes > 1:
        cpu = environment.get("ACCELERATE_USE_CPU")
        launcher = [*(["env", f"ACCELERATE_USE_CPU={cpu}"] if cpu else []), "torchrun", "--nproc_per_node", local]
    else:
        launcher = [sys.executable]
    where = f" (in {Path.cwd()}; on each machine as before)" if processes > int(local) else ""
    return shlex.join([*(["uv", "run"] if "UV" in environment else []), *launcher, *words]) + where


def evaluations(options: RunConfig) -> Mapping[str, "Evaluation"]:
    """What to measure every `evaluate_every` steps: k-NN, and the head where there is one, on the validation split.

    Raises:
        InputError: the data have none.
    """
    if options.evaluate_every is None:
        return {}
    from vitreg_eval.training import evaluations

    folder = None if options.data.path == SCENES else Path(options.data.path)
    if folder is not None and not folder.is_dir():
        raise InputError(
            f"evaluate_every={options.evaluate_every} with data.path={folder}: only scenes, and a folder with train "
            "and val in it, have a validation split; set evaluate_every to none"
        )
    relation = isinstance(options, TrainConfig) and options.data.label == "relation"
    found = evaluations(folder, "relation" if relation else "label", options.precision)
    if options.signal == "distill":
        return {"knn": found["knn"]}  # its head may name other classes
    if options.signal != "contrast":
        return found
    knn = found["knn"]  # its head names no classes
    return {"knn": lambda model: knn(model.visual)}


def print_next(options: RunConfig) -> None:
    """Say what to do with the trained model: a program that names the class of a photo, and the next command."""
    from vitreg_core.data.images import labelled_images, read_image

    def readable(path: Path) -> bool:
        with suppress(InputError):
            return bool(read_image(path))
        return False

    folder = Path(options.data.path)
    folder = folder / "train" if (folder / "train").is_dir() else folder
    try:
        photo = (
            None
            if options.data.path == SCENES or options.signal != "classify"
            else next(filter(readable, labelled_images(folder).paths), None)
        )
    except InputError:  # shards, tars or a data set of the hub: no file to name
        photo = None
    if photo is not None:
        print(f"trained; to name the class of a photo:\n\n{SNIPPET.format(out=str(options.out), photo=str(photo))}\n")
    print(f"trained; next: vitreg-eval {'zeroshot' if options.signal == 'contrast' else 'knn'} --model {options.out}")


def main(arguments: list[str]) -> None:
    """List the runs, or train one."""
    with one_line_errors(PROGRAM):
        if not arguments or arguments[0] in ("-h", "--help"):
            print_runs()
            sys.stdout.flush()
            return
        config, resume = parse(arguments[0], arguments[1:])
        use_all_cores()
        from vitreg_recipes.loop import train  # after the options, which must answer at once

        command = resume_command(arguments, os.environ)
        train(config, resume=resume, evaluations=evaluations(config), command=command)
    if config.out is not None and os.environ.get("RANK", "0") == "0":
        print_next(config)


if __name__ == "__main__":
    main(sys.argv[1:])
