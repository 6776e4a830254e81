"""Gradient accumulation: an objective that takes its batches in parts."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from vitreg_core.errors import InputError

from vitreg_recipes.config import RunConfig, local_batch
from vitreg_recipes.objectives import Objective


class Accumulate:
    """Runs another objective on equal parts of every batch, whose gradients add up to that of the whole batch.

    The loss must be a mean over images. Mixing acts within a part, as it acts within the share of a process. Accelerate
    divides the loss by the number of parts; the processes exchange gradients after the last one.
    """

    def __init__(self, objective: Objective, network: nn.Module, accelerator: Accelerator, parts: int) -> None:
        self.objective = objective
        self.network = network
        self.accelerator = accelerator
        self.parts = parts

    def step(self, batch: Any) -> dict[str, Tensor]:  # noqa: ANN401 (anything that can `split`)
        """Run forward and backward on every part.

        Returns:
            The means of the objective's metrics over the parts.
        """
        found: list[Mapping[str, Tensor]] = []
        for number, part in enumerate(batch.split(self.parts), 1):
            with nullcontext() if number == self.parts else self.accelerator.no_sync(self.network):
                found.append(self.objective.step(part))
        return {name: torch.stack([metrics[name] for metrics in found]).mean() for name in found[0]}

    def clip(self) -> None:
        """Clip the whole gradient."""
        self.objective.clip()

    def after_step(self) -> None:
        """What follows an optimizer step."""
        self.objective.after_step()

    def state_dict(self) -> dict[str, Any]:
        """What the objective keeps."""
        return self.objective.state_dict()

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.objective.load_state_dict(values)


def check_parts(config: RunConfig, processes: int) -> None:
    """Refuse parts of different sizes, whose mean is not that of the batch, or that cannot be mixed in pairs.

    Raises:
        InputError: names the batch, the processes and the parts.
    """
    share = local_batch(config, processes)
    if share % config.accumulate or (config.in_pairs and share // config.accumulate % 2):
        pairs = ", each with an even number of images to mix in pairs" if config.in_pairs else ""
        raise InputError(
            f"accumulate={config.accumulate}: the {share} images of a process (data.batch_size="
            f"{config.data.batch_size}, {processes} processes) do not split into equal parts{pairs}; change one of them"
        )
