"""The folder of a run: `run.json` says what runs there; `checkpoints/` and, at the end, the model stand beside it."""

import json
from pathlib import Path
from typing import Any

from vitreg_core.config import validate
from vitreg_core.errors import InputError
from vitreg_core.provenance import commit, versions
from vitreg_core.whole import write_json

from vitreg_recipes.checkpoints import load_newest, remove_leftovers, save_export
from vitreg_recipes.config import check_same
from vitreg_recipes.state import TrainState


def open_run(state: TrainState, *, resume: bool) -> None:
    """Make the folder of a run, or continue the run in it.

    Raises:
        InputError: the folder holds a run and `resume` is off, holds none and it is on, holds another run, or cannot be
            written.
    """
    out = state.config.out
    if out is None:
        if resume:
            raise InputError("out=None: a run without a folder cannot resume; give --out")
        return
    refuse_other_run(state, out, resume=resume)
    state.accelerator.wait_for_everyone()
    if state.accelerator.is_main_process:
        prepare(state, out)
    state.accelerator.wait_for_everyone()
    if resume:
        load_newest(state, out / "checkpoints")


def refuse_other_run(state: TrainState, out: Path, *, resume: bool) -> None:
    """Refuse to overwrite a run, or to continue what is not this one."""
    if not resume:
        if (out / "run.json").exists() or (out / "model.safetensors").exists():
            raise InputError(f"{out}: already holds a run; give --resume or another --out")
        return
    if not (out / "run.json").exists():
        raise InputError(f"{out}: holds no run to resume; leave out --resume, or give the --out of the run")
    before = read_record(out / "run.json")
    if (signal := before.get("signal", state.config.signal)) != state.config.signal:
        raise InputError(f"{out}: the run there trains with another signal ({signal}); give another --out")
    check_same(state.config, validate(type(state.config), before.get("config", {}), str(out / "run.json")))
    now = record(state)
    for name in ("processes", "images", "classes"):
        if before.get(name) != now[name]:
            raise InputError(
                f"{out}: the run there has other {name} ({shorten(before.get(name))}, not {shorten(now[name])}); "
                "resume with the same, or give another --out"
            )


def prepare(state: TrainState, out: Path) -> None:
    """Write `run.json` and `classes.json`, and remove what a process that was killed left."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        write_json(out / "classes.json", state.data.classes)
        write_json(out / "run.json", record(state))
    except OSError as error:
        raise InputError(f"{out}: cannot write the run ({error}); give another --out") from None


def close_run(state: TrainState) -> None:
    """Export the trained model, so that the folder of the run is a model folder."""
    if state.config.out is not None:
        save_export(state, state.config.out)
    state.accelerator.wait_for_everyone()


def record(state: TrainState) -> dict[str, Any]:
    """What is needed to run it again."""
    return {
        "signal": state.config.signal,
        "config": state.config.model_dump(mode="json"),
        "seed": state.config.seed,
        "steps": state.steps,
        "processes": state.accelerator.num_processes,
        "device": state.accelerator.device.type,
        "images": state.data.images,
        "classes": state.data.classes,
        "versions": versions(),
        "commit": commit(),
    }


def read_record(path: Path) -> dict[str, Any]:
    """Read a `run.json`.

    Raises:
        InputError: it is damaged.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); give another --out") from None
    return values if isinstance(values, dict) else {}


def shorten(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
