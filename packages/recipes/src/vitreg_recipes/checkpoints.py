"""Checkpoints and other models on the disk: written whole or not at all, and found again."""

import os
import pickle
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights import save_model
from vitreg_core.weights.files import check_tensors, read_tensors

from vitreg_recipes.state import TrainState
from vitreg_recipes.strategy import fill, whole

DAMAGE = (InputError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError)
"""What reading a truncated or overwritten checkpoint can raise."""
WRITE_FAILURES = (OSError, RuntimeError, SafetensorError, InputError)
"""What a full disk makes of writing: each library raises its own."""


@runtime_checkable
class Exported(Protocol):
    """A model that writes itself in the form in which it is used."""

    def export(self, folder: Path) -> None:
        """Write into a folder, which is made where it is missing."""


def save_checkpoint(state: TrainState, folder: Path) -> None:
    """Write `folder/step_<n>`, whole or not at all, and remove all but the last few. Every process must call it.

    A checkpoint is a model folder (`load_model` reads it, and `ema` in it) with `state.pt` beside the weights, and the
    tensors of networks that the model folder does not hold in `<name>.weights` (safetensors).

    Raises:
        InputError: the weights are not finite, or the folder cannot be written.
    """
    values, models, main = state.state_dict(), state.models(), state.accelerator.is_main_process
    refuse_broken(state, models)
    kept = {name: whole(tensors, keep=main) for name, tensors in resumable(state).items()}

    def write(temporary: Path) -> None:
        write_models(models, temporary)
        for name, tensors in kept.items():
            save_tensors(tensors, temporary / f"{name}.weights")
        torch.save(values, temporary / "state.pt")

    if state.accelerator.is_main_process:
        write_whole(folder / step_name(state), write)
        done = [path for path in checkpoints(folder) if step_of(path) <= state.step]  # newer ones are damaged
        for old in done[state.config.keep_last :]:
            shutil.rmtree(old)
    state.accelerator.wait_for_everyone()


def save_snapshot(state: TrainState, folder: Path) -> None:
    """Write `folder/step_<n>`: the model, and the average in `ema`, without what resuming needs. All must call it.

    Raises:
        InputError: the weights are not finite, or the folder cannot be written.
    """
    models = state.models()
    refuse_broken(state, models)
    if state.accelerator.is_main_process:
        write_whole(folder / step_name(state), lambda temporary: write_models(models, temporary))


def save_export(state: TrainState, out: Path) -> None:
    """Write the trained model into the folder of the run, and the average into `ema` there. All must call it.

    Raises:
        InputError: the folder cannot be written.
    """
    models = state.models()
    if not state.accelerator.is_main_process:
        return
    written = out / ".exported.tmp"

    def write(temporary: Path) -> None:
        write_models(models, temporary)
        for name in state.exported:
            save_tensors(state.others[name].state_dict(), temporary / f"{name}.safetensors")

    write_whole(written, write)
    shutil.rmtree(out / "ema", ignore_errors=True)
    for path in sorted(written.iterdir()):  # the weights come last: a folder with them is complete
        path.replace(out / path.name)
    written.rmdir()


def step_name(state: TrainState) -> str:
    """Name of the folder of the present step."""
    return f"step_{state.step:06d}"


def refuse_broken(state: TrainState, models: Mapping[str, nn.Module]) -> None:
    """Refuse weights that no file should hold; all processes do, where the main one finds some.

    Raises:
        InputError: names the step, a tensor and what to do.
    """
    tensors = (item for model in models.values() for item in model.state_dict().items())
    broken = next((name for name, value in tensors if not value.isfinite().all()), None)
    if found := broadcast_object_list([broken])[0]:
        raise InputError(f"step {state.step}: {found} is not finite, and is not saved; {state.config.rates}")


def write_models(models: Mapping[str, nn.Module], folder: Path) -> None:
    """Write the model into a folder, and the average into `ema` in it."""
    for name, model in models.items():
        where = folder if name == "model" else folder / name
        if isinstance(model, VisionTransformer):
            save_model(model, where)
        elif isinstance(model, Exported):
            model.export(where)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors under their names."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def resumable(state: TrainState) -> dict[str, Mapping[str, Tensor]]:
    """Tensors that a checkpoint keeps as they are: all that `write_models` does not write under the same names."""
    written = {"ema", "model"} if isinstance(state.model, VisionTransformer) else set()
    return {name: tensors for name, tensors in state.weights().items() if name not in written}


def write_whole(final: Path, write: Callable[[Path], None]) -> None:
    """Write into a temporary folder, force it to the disk, and give it its name.

    Raises:
        InputError: it cannot be written; nothing of it is left.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in (*temporary.rglob("*"), temporary):
            force_to_disk(path)
        if final.exists():  # damaged and passed over when the run resumed, or left by a process that was killed
            shutil.rmtree(final)
        temporary.rename(final)
        force_to_disk(final.parent)
    except WRITE_FAILURES as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).partition("\n")[0]
        raise InputError(f"{final}: cannot be written ({reason}); make room, then --resume") from None


def force_to_disk(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(out: Path) -> None:
    """Remove what processes that were killed left behind in the folder of a run."""
    for leftover in (*out.glob(".*.tmp"), *out.glob("*/.*.tmp")):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def step_of(checkpoint: Path) -> int:
    """Step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    found = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def load_newest(state: TrainState, folder: Path) -> None:
    """Continue from the newest checkpoint that can be read; without any, from the start.

    Raises:
        InputError: there are checkpoints, and none can be read.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            load_checkpoint(state, path)
        except DAMAGE as error:
            reason = textwrap.shorten(str(error) or type(error).__name__, 120)
            tqdm.write(f"{path}: damaged checkpoint ({reason}), using the one before", file=sys.stderr)
        else:
            return
    if found:
        raise InputError(f"{folder}: none of {len(found)} checkpoints can be read; give another --out to start afresh")


def load_checkpoint(state: TrainState, folder: Path) -> None:
    """Take weights, average and state from a checkpoint."""
    values = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    kept = resumable(state)
    for name, targets in state.weights().items():
        exported = "model.safetensors" if name == "model" else f"{name}/model.safetensors"
        file = folder / (f"{name}.weights" if name in kept else exported)
        tensors = read_tensors(file)
        check_tensors(targets, tensors, file, {})
        fill(targets, tensors)
    state.load_state_dict(values)
