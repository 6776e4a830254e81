"""TrainState: a run under way, and all of it that a checkpoint must hold beside the weights."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from vitreg_core.vit import VisionTransformer

from vitreg_recipes.parts import Parts
from vitreg_recipes.strategy import fill_optimizer, whole


class TrainState:
    """A run under way: all that changes while it trains."""

    def __init__(self, accelerator: Accelerator, parts: Parts) -> None:
        self.accelerator = accelerator
        self.config = parts.config
        self.data = parts.data
        self.model = parts.model
        self.objective = parts.objective
        self.optimizer = parts.optimizer
        self.schedule = parts.schedule
        self.ema = parts.ema
        self.others = parts.others
        self.exported = parts.exported
        self.share, self.epoch_steps, self.steps = parts.extent
        self.step = 0
        """Optimizer steps done."""
        self.data_seconds = 0.0
        """Time spent waiting for batches since the process started."""
        self.schedule.apply(self.optimizer, 0)

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return self.schedule.lr(max(self.step - 1, 0))

    def advance(self) -> None:
        """Optimizer step, moving average, step count, schedule."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)
        self.step += 1
        self.schedule.apply(self.optimizer, self.step)

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors of `model`, of `ema` where an average is kept, and of other networks; split where they are."""
        averages = {} if self.ema is None else {"ema": self.ema.tensors}
        others = {name: network.state_dict() for name, network in self.others.items()}
        return {"model": self.model.state_dict(), **averages, **others}

    def models(self) -> dict[str, nn.Module]:
        """The model, and the moving average of it where one is kept. Every process must call it.

        Returns:
            `model` and perhaps `ema`; where they are split, the main process gets whole ones, and the others none.
        """
        main, copies = self.accelerator.is_main_process, self.config.strategy == "ddp"
        found: dict[str, nn.Module] = {"model": self.model} if copies else {}
        split = {"model": self.model.state_dict()} if not copies else {}
        averages = {} if self.ema is None else {"ema": self.ema.tensors}
        for name, tensors in {**split, **averages}.items():
            joined = whole(tensors, keep=main)
            if main or copies:
                found[name] = model_of(joined, self.model)
        return found

    def state_dict(self) -> dict[str, Any]:
        """All but the weights: tensors, numbers, strings, and lists of them. Every process must call it."""
        return {
            "step": self.step,
            "optimizer": whole(self.optimizer.state_dict(), keep=self.accelerator.is_main_process),
            "objective": self.objective.state_dict(),
            "random": gather_object([random_state(self.accelerator.device)]),
            "skipped": sorted(set(gather_object(sorted(self.data.skipped)))),
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        fill_optimizer(self.optimizer, values["optimizer"])
        self.objective.load_state_dict(values["objective"])
        self.data.skipped.update(values["skipped"])
        self.step = values["step"]
        set_random_state(values["random"][self.accelerator.process_index], self.accelerator.device)


def model_of(tensors: Mapping[str, Tensor], like: nn.Module) -> VisionTransformer:
    """A model like another one that holds these tensors themselves, in evaluation mode."""
    assert isinstance(like, VisionTransformer)  # no other model is averaged or split
    with torch.device("meta"):
        model = VisionTransformer(like.config, like.preprocess.config, source=like.source)
    model.load_state_dict(dict(tensors), assign=True)
    return model.eval()


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


@contextmanager
def undisturbed(state: TrainState) -> Iterator[None]:
    """Let nothing inside the block change what the training will draw, nor the mode of the model."""
    before, training = random_state(state.accelerator.device), state.model.training
    try:
        yield
    finally:
        set_random_state(before, state.accelerator.device)
        state.model.train(training)
