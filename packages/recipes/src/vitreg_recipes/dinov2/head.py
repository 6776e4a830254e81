"""The head that turns class and patch tokens into logits over prototypes (DINO, section 3.1; DINOv2, section 4)."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Prototypes(nn.Module):
    """A linear layer without bias whose rows have a length of their own: `weight_g`, one at the start, and learned."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1))  # k 1
        self.weight_v = nn.Parameter(torch.empty(count, width))  # k width
        nn.init.uniform_(self.weight_v, -(width**-0.5), width**-0.5)

    def forward(self, directions: Float[Tensor, "n width"]) -> Float[Tensor, "n k"]:
        """Similarity to every prototype."""
        return F.linear(directions, self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class DinoHead(nn.Module):
    """An MLP to a narrow layer, unit length, then prototypes."""

    def __init__(self, embed_dim: int, *, prototypes: int, hidden: int, bottleneck: int, layers: int) -> None:
        super().__init__()
        widths = [embed_dim, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for before, after in pairwise(widths):
            linear = nn.Linear(before, after)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            parts += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        self.last_layer = Prototypes(bottleneck, prototypes)

    def forward(self, tokens: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Logits over the prototypes, before any temperature."""
        narrow = self.mlp(tokens)
        eps = 1e-6 if narrow.dtype == torch.float16 else 1e-12
        return self.last_layer(F.normalize(narrow, dim=-1, eps=eps))
