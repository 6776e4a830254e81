"""TrainState: a run under way, and all of it that a checkpoint must hold beside the weights."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.optim import Optimizer
from vitreg_core.vit import VisionTransformer

from vitreg_recipes.config import TrainConfig, local_batch
from vitreg_recipes.data import Data, Share
from vitreg_recipes.ema import Ema
from vitreg_recipes.objectives import Objective
from vitreg_recipes.optim import lr_at, set_lr
from vitreg_recipes.strategy import fill_optimizer, whole


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
        ema: Ema | None = None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.data = data
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        self.ema = ema
        processes = accelerator.num_processes
        self.share = Share(local_batch(config, processes), accelerator.process_index, processes)
        """The part of every batch that is this process's."""
        self.epoch_steps = data.epoch_steps(self.share)
        """Optimizer steps of an epoch."""
        self.steps = config.steps or (config.epochs or 0) * self.epoch_steps
        """Optimizer steps of the whole run."""
        self.step = 0
        """Optimizer steps done."""
        self.data_seconds = 0.0
        """Time spent waiting for batches since the process started."""
        set_lr(optimizer, self.lr_at(0))

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        return lr_at(step, self.config.optim, self.steps, self.epoch_steps)

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return self.lr_at(max(self.step - 1, 0))

    def advance(self) -> None:
        """Optimizer step, moving average, step count, schedule."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)
        self.step += 1
        set_lr(self.optimizer, self.lr_at(self.step))

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors of `model`, and of `ema` where an average is kept; split where the strategy splits them."""
        averages = {} if self.ema is None else {"ema": self.ema.tensors}
        return {"model": self.model.state_dict(), **averages}

    def models(self) -> dict[str, VisionTransformer]:
        """The model, and the moving average of it where one is kept. Every process must call it.

        Returns:
            `model` and perhaps `ema`; where they are split, the main process gets whole ones, and the others none.
        """
        main = self.accelerator.is_main_process
        found: dict[str, VisionTransformer] = {}
        for name, tensors in self.weights().items():
            if name == "model" and self.config.strategy == "ddp":
                found[name] = self.model
                continue
            joined = whole(tensors, keep=main)
            if main or self.config.strategy == "ddp":
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


def model_of(tensors: Mapping[str, Tensor], like: VisionTransformer) -> VisionTransformer:
    """A model like another one that holds these tensors themselves, in evaluation mode."""
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
