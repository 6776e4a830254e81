"""The snapshots of a training: where they lie in the folder of a run, and after which step each was written.

A run keeps `snapshots/step_<n>` for good and the last few `checkpoints/step_<n>`; each is a model folder, with the
moving average, where there is one, in `ema`. `run.json` says how many steps the whole training has.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vitreg_core.errors import InputError

FEWEST = 2


@dataclass(frozen=True)
class Snapshot:
    """A model after some steps."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Training:
    """The snapshots of one training."""

    name: str
    """What a reader calls it."""
    steps: int
    """Of the whole training, as its run.json says; without one, those of the last snapshot."""
    snapshots: tuple[Snapshot, ...]
    """By increasing step, two or more."""


def find_trainings(sources: Sequence[str], given: Sequence[Path]) -> list[Training]:
    """The trainings among model sources, or the one whose snapshots are given.

    Raises:
        InputError: fewer than two snapshots of any training, or a folder without a step in its name.
    """
    if given:
        name = given[0].resolve().parent.parent.name
        return [training(name, [snapshot(folder) for folder in given], whole_steps(given[0].resolve().parent.parent))]
    runs = [Path(source) for source in sources if (Path(source) / "run.json").is_file()]
    found = {run: [snapshot(folder) for folder in step_folders(run)] for run in runs}
    kept = [training(run.resolve().name, own, whole_steps(run)) for run, own in found.items() if len(own) >= FEWEST]
    if not kept:
        counts = ", ".join(f"{run} has {len(own)}" for run, own in found.items()) or "no --model is a run folder"
        raise InputError(
            f"two or more snapshots of a training are needed, and {counts}; give --snapshots A B ..., or a run that "
            "was trained with --snapshot_every"
        )
    return kept


def training(name: str, snapshots: Sequence[Snapshot], steps: int | None) -> Training:
    """Snapshots by increasing step.

    Raises:
        InputError: fewer than two, or two of one step.
    """
    ordered = sorted(snapshots, key=lambda one: one.step)
    if len(ordered) < FEWEST:
        raise InputError(f"--snapshots {ordered[0].folder}: one shows no change; give two or more of one training")
    for one, other in pairwise(ordered):
        if one.step == other.step:
            raise InputError(f"--snapshots {one.folder} and {other.folder}: both of step {one.step}; leave one out")
    return Training(name, max(steps or 0, ordered[-1].step), tuple(ordered))


def step_folders(run: Path) -> list[Path]:
    """Folders of a run, one for each step: snapshots, and checkpoints of steps that have none."""
    by_name: dict[str, Path] = {}
    for part in ("checkpoints", "snapshots"):
        by_name |= {folder.name: folder for folder in complete((run / part).glob("step_*"))}
    return list(by_name.values())


def complete(folders: Iterable[Path]) -> Iterable[Path]:
    """Folders that hold weights."""
    return (folder for folder in folders if (folder / "model.safetensors").is_file())


def snapshot(folder: Path) -> Snapshot:
    """A model folder with the step in its name; the moving average in it where there is one.

    Raises:
        InputError: no number at the end of the name.
    """
    match = re.search(r"(\d+)$", folder.resolve().name)
    if match is None:
        raise InputError(f"{folder}: no step in its name; name it step_<number>")
    average = folder / "ema"
    return Snapshot(int(match[1]), average if (average / "model.safetensors").is_file() else folder)


def whole_steps(run: Path) -> int | None:
    """Steps of the whole training; None where nobody says."""
    try:
        steps = json.loads((run / "run.json").read_text())["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None
