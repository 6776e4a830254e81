"""Named runs: each is a function that returns a config. With `_regN` behind its name, a run has N registers."""

import inspect
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

from vitreg_core.config import nearest, override
from vitreg_core.errors import InputError

from vitreg_recipes.config import RunConfig
from vitreg_recipes.dinov2.config import DinoConfig
from vitreg_recipes.runs import deit3, dinov2, distill, openclip, registers


class Notes(NamedTuple):
    """What is known of a run."""

    summary: str
    """What is trained, in a line."""
    published: str
    """Result that others published, with its source."""
    measured: str
    """Result of ours."""
    cost: str
    """Images, FLOPs and hours."""


def runs_of(module: ModuleType) -> Iterator[tuple[str, Callable[[], RunConfig]]]:
    """Yield the functions of a module that return a config and take nothing."""
    for name, value in vars(module).items():
        given = value.__annotations__ if inspect.isfunction(value) else {}
        if list(given) == ["return"] and isinstance(given["return"], type) and issubclass(given["return"], RunConfig):
            yield name, value


RUNS: dict[str, Callable[[], RunConfig]] = {
    name: run for module in (deit3, dinov2, openclip, distill, registers) for name, run in runs_of(module)
}


def find(name: str) -> RunConfig:
    """Config of a run, or of one with `_regN` behind its name, which has N registers and starts from a run with N.

    Raises:
        InputError: no such run; names the nearest one.
    """
    run, count = split(name)
    if count is None:
        return RUNS[run]()
    config = RUNS[run]()
    changes = {"model.registers": count} | ({"init": f"{config.init}_reg{count}"} if config.init else {})
    if isinstance(config, DinoConfig) and config.teacher.source:
        changes["teacher.source"] = f"{config.teacher.source}_reg{count}"
    return override(config, changes)


def notes(name: str) -> Notes:
    """What is known of a run.

    Raises:
        InputError: no such run; names the nearest one.
    """
    run, count = split(name)
    text = inspect.getdoc(RUNS[run]) or ""
    summary, known = text.split("\n")[0].rstrip("."), text
    if count is not None:
        summary, known = f"{summary}; registers: {count}", registers.VARIANTS.get(name, "")
    return Notes(summary, note(known, "Published", "none"), note(known, "Measured", "not yet"), note(text, "Cost", ""))


def list_runs() -> dict[str, str]:
    """Names of the runs, with a line on each: what it is, the published result, and ours."""
    names = [name for run in RUNS for name in (run, *(v for v in registers.VARIANTS if split(v)[0] == run))]
    return {
        name: f"{n.summary}. Published: {n.published}. Ours: {n.measured}." for name in names for n in [notes(name)]
    }


def split(name: str) -> tuple[str, int | None]:
    """Split a name into that of the run and its count of registers, if it names one."""
    if name in RUNS:
        return name, None
    match = re.fullmatch(r"(.+)_reg(\d+)", name)
    if match and match[1] in RUNS:
        return match[1], int(match[2])
    suffix = f"_reg{match[2]}" if match else ""
    known = [f"{run}{suffix}" for run in RUNS]
    raise InputError(f"unknown run {name!r}{nearest(name, known)}; train.py alone lists the runs")


def note(text: str, label: str, default: str) -> str:
    """What stands behind a label of a docstring, on its line and those that continue it."""
    match = re.search(rf"^{label}: (.*?)\.?(?=\n\w+: |\Z)", text, re.DOTALL | re.MULTILINE)
    return " ".join(match[1].split()) if match else default
