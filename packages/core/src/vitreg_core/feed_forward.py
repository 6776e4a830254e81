"""The two kinds of MLP: with GELU, and SwiGLU."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """Maps every token by itself, through hidden units that can be looked at."""

    hidden_dim: int
    """Number of hidden units."""

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """What the hidden units write for these tokens."""
        return self.output(self.hidden(tokens))

    @abstractmethod
    def hidden(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n hidden"]:
        """Hidden units after the activation."""

    @abstractmethod
    def output(self, hidden: Float[Tensor, "b n hidden"]) -> Float[Tensor, "b n d"]:
        """What the hidden units write."""


class Mlp(FeedForward):
    """Two linear layers with an exact GELU between."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def hidden(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n hidden"]:
        """Hidden units after the GELU."""
        return F.gelu(self.fc1(tokens))

    def output(self, hidden: Float[Tensor, "b n hidden"]) -> Float[Tensor, "b n d"]:
        """What the hidden units write."""
        return self.fc2(hidden)


class SwiGLU(FeedForward):
    """Gated MLP of DINOv2 g: `w3(silu(a) * b)` where one packed layer gives a, then b.

    Its width is 2/3 of `hidden_dim`, rounded up to a multiple of 8, which keeps the parameters of an `Mlp`.
    """

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = (hidden_dim * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(embed_dim, 2 * self.hidden_dim)
        self.w3 = nn.Linear(self.hidden_dim, embed_dim)

    def hidden(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n hidden"]:
        """Hidden units after the gate."""
        gate, value = torch.chunk(self.w12(tokens), 2, dim=-1)
        return F.silu(gate) * value

    def output(self, hidden: Float[Tensor, "b n hidden"]) -> Float[Tensor, "b n d"]:
        """What the hidden units write."""
        return self.w3(hidden)


FEED_FORWARDS: dict[str, type[Mlp] | type[SwiGLU]] = {"mlp": Mlp, "swiglu": SwiGLU}
