"""Moving average of the weights."""

import torch
from torch import nn

from vitreg_recipes.strategy import local


class Ema:
    """Average of all weights over the steps: after each, decay of itself and 1 - decay of the weights (Polyak).

    It starts at the first weights, and is kept in float32 as they are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        """The averages by the names of the weights; split over the processes where the weights are."""

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the present weights, as timm's ModelEmaV3 does."""
        weights = model.state_dict()
        torch._foreach_lerp_(
            [local(average) for average in self.tensors.values()],
            [local(weights[name]) for name in self.tensors],
            weight=1.0 - self.decay,
        )
