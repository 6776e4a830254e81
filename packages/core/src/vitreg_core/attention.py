"""Multi-head self-attention over all tokens."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_core.features import QKV


class Attention(nn.Module):
    """Softmax attention with one packed projection; rows of `qkv` are queries, keys, values, each head by head."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Mix the tokens."""
        parts = self.project(tokens)
        mixed = F.scaled_dot_product_attention(parts.queries, parts.keys, parts.values)
        return self.proj(rearrange(mixed, "b h n k -> b n (h k)"))

    def project(self, tokens: Float[Tensor, "b n d"]) -> QKV:
        """Queries, keys and values before scaling."""
        return QKV(*rearrange(self.qkv(tokens), "b n (three h k) -> three b h n k", three=3, h=self.num_heads))

    def weights(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n n"]:
        """Attention weights after the softmax, which the fused kernel of `forward` does not keep."""
        parts = self.project(tokens)
        scores = parts.queries @ parts.keys.transpose(-2, -1) * parts.queries.shape[-1] ** -0.5
        return scores.softmax(dim=-1)
