"""One pre-norm transformer block, with LayerScale and drop path."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg_core.attention import Attention
from vitreg_core.config import ViTConfig
from vitreg_core.feed_forward import FEED_FORWARDS, FeedForward


class LayerScale(nn.Module):
    """A learned factor per channel of a residual branch (Touvron et al. 2021)."""

    def __init__(self, embed_dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), initial))  # d

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Scale every channel."""
        return tokens * self.gamma


class DropPath(nn.Module):
    """Drops a residual branch of whole samples while training; the kept ones are divided by the kept share."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Zero the branch of some samples."""
        if not self.training or self.probability == 0.0:
            return tokens
        kept = 1.0 - self.probability
        mask = tokens.new_empty(len(tokens), 1, 1).bernoulli_(kept)
        return tokens * mask / kept


class Block(nn.Module):
    """`x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config.embed_dim, config.num_heads)
        self.ls1 = branch_scale(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp: FeedForward = FEED_FORWARDS[config.feed_forward](
            config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        )
        self.ls2 = branch_scale(config)
        self.drop_path = DropPath(config.drop_path)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Add what attention and MLP write to the residual stream."""
        tokens = self.after_attention(tokens)
        return tokens + self.drop_path(self.ls2(self.mlp(self.norm2(tokens))))

    def after_attention(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The residual stream between attention and MLP."""
        return tokens + self.drop_path(self.ls1(self.attn(self.norm1(tokens))))


def branch_scale(config: ViTConfig) -> nn.Module:
    """LayerScale where the config asks for it."""
    return nn.Identity() if config.layer_scale is None else LayerScale(config.embed_dim, config.layer_scale)
