"""What the teacher's logits become: softmax after centring, or Sinkhorn-Knopp. All in float32, over all processes."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributed as dist

from vitreg_recipes.dinov2.losses import wide

ROUNDS = 3
"""Iterations of Sinkhorn-Knopp."""
KEPT = 0.9
"""What a centre keeps of itself at each step."""


def processes() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, which all must call; the tensor itself where there is one."""
    if processes() > 1:
        dist.all_reduce(values)
    return values


class Center(nn.Module):
    """Teacher targets by softmax, after a running mean of the logits is taken off (DINO, section 3.1).

    The mean of a batch counts from the next call on, as in DINOv2, where it is reduced while the step goes on.
    """

    center: Float[Tensor, "1 k"]

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(1, prototypes))

    @torch.no_grad()
    def forward(self, logits: Float[Tensor, "n k"], temperature: float) -> Float[Tensor, "n k"]:
        """Targets whose rows sum to 1; then the centre moves towards the mean of these logits.

        The mean is taken in each process and then over the processes, each counting the same.
        """
        logits = wide(logits)
        targets = ((logits - self.center) / temperature).softmax(dim=-1)
        mean = logits.mean(dim=0, keepdim=True) if len(logits) else self.center.clone()
        self.center.lerp_(sum_over_processes(mean) / processes(), 1 - KEPT)
        return targets


class SinkhornKnopp(nn.Module):
    """Teacher targets that use all prototypes about equally (SwAV; DINOv2, section 4)."""

    @torch.no_grad()
    def forward(self, logits: Float[Tensor, "n k"], temperature: float) -> Float[Tensor, "n k"]:
        """Targets whose rows sum to 1. Every process must call it, though it may have no rows."""
        scaled = wide(logits) / temperature
        most = scaled.max() if len(scaled) else scaled.new_tensor(-torch.inf)
        if processes() > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        shares = (scaled - most).exp()  # n k; the common factor cancels
        shares = shares / sum_over_processes(shares.sum())
        count = sum_over_processes(shares.new_tensor(len(shares)))
        for _ in range(ROUNDS):
            shares = shares / sum_over_processes(shares.sum(dim=0, keepdim=True)) / shares.shape[1]
            shares = shares / shares.sum(dim=1, keepdim=True) / count
        return shares * count
