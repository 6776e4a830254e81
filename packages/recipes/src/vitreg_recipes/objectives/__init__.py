"""Training signals: what to do with a batch. The loop knows of them no more than this."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Objective(Protocol):
    """One training signal and the networks it trains."""

    def step(self, batch: Any) -> Mapping[str, Tensor]:  # noqa: ANN401 (each signal has batches of its own)
        """Run forward and backward; returns scalars by name, among them `loss`."""

    def clip(self) -> None:
        """Clip the gradients of each network; nothing where the optimizer clips inside."""

    def after_step(self) -> None:
        """Do what follows an optimizer step: moving averages, clamps."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that a checkpoint must keep beyond model and optimizer."""

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
