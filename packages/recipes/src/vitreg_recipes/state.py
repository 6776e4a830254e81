"""TrainState: what a checkpoint holds; how it is written, read and found again."""

import os
import pickle
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim import Optimizer
from tqdm import tqdm
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights import save_model
from vitreg_core.weights.files import load_checked, read_tensors

from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data import Data
from vitreg_recipes.objectives import Objective
from vitreg_recipes.optim import lr_at, set_lr

DAMAGE = (InputError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError)
"""What reading a truncated or overwritten checkpoint can raise."""


class TrainState:
    """A run under way: all that changes while it trains."""

    def __init__(  # the parts of a run, once each
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        data: Data,
        model: VisionTransformer,
        objective: Objective,
        optimizer: Optimizer,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.data = data
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        self.step = 0
        """Optimizer steps done."""
        set_lr(optimizer, lr_at(0, config.optim, config.steps))

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return lr_at(max(self.step - 1, 0), self.config.optim, self.config.steps)

    def advance(self) -> None:
        """Optimizer step, schedule, step count."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        set_lr(self.optimizer, lr_at(self.step, self.config.optim, self.config.steps))

    def state_dict(self) -> dict[str, Any]:
        """All but the weights: tensors, numbers, strings, and lists of them. Every process must call it."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "random": gather_object([random_state(self.accelerator.device)]),
            "skipped": sorted(set(gather_object(sorted(self.data.skipped)))),
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.optimizer.load_state_dict(values["optimizer"])
        self.objective.load_state_dict(values["objective"])
        self.data.skipped.update(values["skipped"])
        self.step = values["step"]
        set_random_state(values["random"][self.accelerator.process_index], self.accelerator.device)


def random_state(device: torch.device) -> dict[str, Any]:
    """States of the generators of python, NumPy and torch in this process."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002 (what timm's Mixup draws from)
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators back."""
    keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def save_checkpoint(state: TrainState, folder: Path, *, keep_last: int) -> None:
    """Write `folder/step_<n>`, whole or not at all, and remove all but the last few. Every process must call it.

    A checkpoint is a model folder (`load_model` reads it) with `state.pt` beside the weights.

    Raises:
        InputError: the weights are not finite, or the folder cannot be written.
    """
    values = state.state_dict()
    refuse_broken(state)
    if state.accelerator.is_main_process:
        try:
            write_checkpoint(state.model, values, folder)
        except OSError as error:
            raise InputError(f"{folder}: cannot write a checkpoint ({error}); make room, then --resume") from None
        for old in checkpoints(folder)[keep_last:]:
            shutil.rmtree(old)
    state.accelerator.wait_for_everyone()


def refuse_broken(state: TrainState) -> None:
    """Refuse weights that no file should hold."""
    broken = [name for name, value in state.model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise InputError(
            f"step {state.step}: {broken[0]} is not finite, and is not saved; "
            f"lower optim.lr={state.config.optim.lr} or use precision=fp32"
        )


def write_checkpoint(model: VisionTransformer, values: dict[str, Any], folder: Path) -> None:
    """Write into a temporary folder, force it to the disk, and give it its name."""
    final = folder / f"step_{values['step']:06d}"
    temporary = folder / f".{final.name}.tmp"
    temporary.mkdir(parents=True)
    save_model(model, temporary)
    torch.save(values, temporary / "state.pt")
    for path in (*temporary.iterdir(), temporary):
        force_to_disk(path)
    if final.exists():  # a damaged one, passed over when the run resumed
        shutil.rmtree(final)
    temporary.rename(final)
    force_to_disk(folder)


def force_to_disk(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    found = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


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
            reason = (str(error) or type(error).__name__).splitlines()[0]
            tqdm.write(f"{path}: damaged checkpoint ({reason}), using the one before", file=sys.stderr)
        else:
            return
    if found:
        raise InputError(f"{folder}: none of {len(found)} checkpoints can be read; give another --out to start afresh")


def load_checkpoint(state: TrainState, folder: Path) -> None:
    """Take weights and state from a checkpoint."""
    weights = folder / "model.safetensors"
    values = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    load_checked(state.model, read_tensors(weights), weights)
    state.load_state_dict(values)
