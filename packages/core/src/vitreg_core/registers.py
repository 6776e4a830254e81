"""Register tokens: places where the blocks keep what belongs to the whole image."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Registers(nn.Module):
    """Learned tokens without a position, between the class token and the patches (registers paper, section 2.2)."""

    def __init__(self, count: int, embed_dim: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(count, embed_dim))  # r d

    def forward(self, cls: Float[Tensor, " d"] | None, patches: Float[Tensor, "b p d"]) -> Float[Tensor, "b n d"]:
        """Join class token, where there is one, registers and patches into the sequence the blocks read."""
        prefix = self.tokens if cls is None else torch.cat([cls[None], self.tokens])
        return torch.cat([prefix.to(patches.dtype).expand(patches.shape[0], -1, -1), patches], dim=1)
