"""What a signal brings to the loop: data, networks, objective, optimizer, schedule."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from vitreg_recipes.config import RunConfig, local_batch
from vitreg_recipes.data import Data, Share
from vitreg_recipes.ema import Ema
from vitreg_recipes.objectives import Objective


class Extent(NamedTuple):
    """How long a run is, and this process's part of it."""

    share: Share
    """The part of every batch that is this process's."""
    epoch_steps: int
    """Optimizer steps of an epoch."""
    steps: int
    """Optimizer steps of the whole run."""


@runtime_checkable
class Schedule(Protocol):
    """What the optimizer is set to before every step."""

    def lr(self, step: int) -> float:
        """Learning rate of a step, from 0."""

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set what the step needs in every group."""


@dataclass
class Parts:
    """The parts of a run, once each."""

    config: RunConfig
    """The run, with the shapes that its model has."""
    data: Data
    """Where its batches come from."""
    model: nn.Module
    """What the run gives: measured, and exported at the end. A `VisionTransformer`, or a model that knows how to
    `export(folder)` itself and has one as `visual`."""
    objective: Objective
    """The signal."""
    optimizer: Optimizer
    """Moves the weights."""
    schedule: Schedule
    """Sets the optimizer before every step."""
    extent: Extent
    """How long."""
    ema: Ema | None = None
    """Moving average of the model."""
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    """Networks beside the model whose tensors a checkpoint keeps."""
    exported: tuple[str, ...] = ()
    """Those of them that the finished run keeps too, in `<name>.safetensors` beside the model."""


def extent(config: RunConfig, data: Data, accelerator: Accelerator) -> Extent:
    """Count the steps of a run."""
    processes = accelerator.num_processes
    share = Share(local_batch(config, processes), accelerator.process_index, processes)
    epoch_steps = data.epoch_steps(share)
    return Extent(share, epoch_steps, config.steps or (config.epochs or 0) * epoch_steps)


def assemble(config: RunConfig, accelerator: Accelerator) -> Parts:
    """Build the parts of a run. The weights start alike in all processes; what follows is drawn apart."""
    return importlib.import_module(f"vitreg_recipes.signals.{config.signal}").assemble(config, accelerator)
