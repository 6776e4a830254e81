"""Register tokens: places where the blocks keep what belongs to the whole image."""

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn


class Registers(nn.Module):
    """Learned tokens without a position, between the class token and the patches (registers paper, section 2.2)."""

    def __init__(self, count: int, embed_dim: int, std: float) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, embed_dim))  # r d
        nn.init.trunc_normal_(self.tokens, std=std)

    def forward(self, cls: Float[Tensor, "b 1 d"], patches: Float[Tensor, "b p d"]) -> Float[Tensor, "b n d"]:
        """Join class token, registers and patches into the sequence the blocks read."""
        registers = repeat(self.tokens, "r d -> b r d", b=len(patches))
        return torch.cat([cls, registers, patches], dim=1)
