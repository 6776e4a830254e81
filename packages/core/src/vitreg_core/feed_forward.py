"""The two kinds of feed-forward network: an MLP, and SwiGLU."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_core.config import ViTConfig


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
    """Two linear layers with an activation between."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.hidden_dim = config.hidden_dim
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.embed_dim, self.hidden_dim)
        self.fc2 = nn.Linear(self.hidden_dim, config.embed_dim)

    def hidden(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n hidden"]:
        """Hidden units after the activation."""
        return self.activation(self.fc1(tokens))

    def output(self, hidden: Float[Tensor, "b n hidden"]) -> Float[Tensor, "b n d"]:
        """What the hidden units write."""
        return self.fc2(hidden)


class SwiGLU(FeedForward):
    """Gated network of DINOv2 g and DINOv3: `w3(silu(a) * b)` where one packed layer gives a, then b.

    Its width is 2/3 of an MLP's, rounded up to a multiple of `swiglu_align`, which keeps the parameters of an `Mlp`.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.hidden_dim = config.hidden_dim
        self.w12 = nn.Linear(config.embed_dim, 2 * self.hidden_dim)
        self.w3 = nn.Linear(self.hidden_dim, config.embed_dim)

    def hidden(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n hidden"]:
        """Hidden units after the gate."""
        gate, value = torch.chunk(self.w12(tokens), 2, dim=-1)
        return F.silu(gate) * value

    def output(self, hidden: Float[Tensor, "b n hidden"]) -> Float[Tensor, "b n d"]:
        """What the hidden units write."""
        return self.w3(hidden)


def quick_gelu(values: Tensor) -> Tensor:
    """The approximation of GELU that OpenAI's CLIP was trained with."""
    return values * torch.sigmoid(1.702 * values)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}
FEED_FORWARDS: dict[str, type[Mlp] | type[SwiGLU]] = {"mlp": Mlp, "swiglu": SwiGLU}
