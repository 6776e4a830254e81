"""Train a run: `accelerate launch apps/train.py deit3_scenes --model.registers 4 --out runs/reg4`.

Without arguments it lists the runs; `apps/train.py <run> --help` lists the options of one.
"""

import os
import sys
from pathlib import Path

from vitreg_core.options import one_line_errors, parse_options
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.runs import find, list_runs

PROGRAM = "train.py"


class Options(TrainConfig):
    """Options of a training run."""

    resume: bool = False
    """Continue the run in --out from its newest checkpoint."""


def parse(name: str, arguments: list[str]) -> Options:
    """Config of a run with the options of the command line; `out` is runs/<name> unless it says otherwise."""
    default = Options(**{**find(name).model_dump(), "out": Path("runs", name)})
    return parse_options(default, arguments, f"{PROGRAM} {name}")


def print_runs() -> None:
    """List the runs, and how to start one."""
    print("usage: accelerate launch apps/train.py RUN [--option value ...] [--resume]; RUN --help lists the options\n")
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


def main(arguments: list[str]) -> None:
    """List the runs, or train one."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print_runs()
        return
    with one_line_errors(PROGRAM):
        options = parse(arguments[0], arguments[1:])
        use_all_cores()
        from vitreg_recipes.loop import train  # after the options, which must answer at once

        train(TrainConfig(**options.model_dump(exclude={"resume"})), resume=options.resume)
    if options.out is not None and os.environ.get("RANK", "0") == "0":
        print(f"trained; next: vitreg-eval knn --model {options.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
