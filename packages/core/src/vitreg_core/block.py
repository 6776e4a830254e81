"""One pre-norm transformer block, with LayerScale and drop path."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg_core.attention import Attention, Group, Groups, Rotation
from vitreg_core.config import ViTConfig
from vitreg_core.feed_forward import FEED_FORWARDS, FeedForward

SUBSET_ABOVE = 0.1
"""Up to this probability DINOv2 drops single samples of a batch; above it, and for packed batches, it runs subsets."""

Branch = Callable[[Tensor, Groups], Tensor]


class LayerScale(nn.Module):
    """A learned factor per channel of a residual branch (Touvron et al. 2021)."""

    def __init__(self, embed_dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), initial))  # d

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Scale every channel."""
        return tokens * self.gamma


class DropPath(nn.Module):
    """Adds a residual branch, which some images of a batch go without while training (stochastic depth).

    By sample, each image drops it with the given probability, and the rest is divided by the kept share. By subset, the
    branch runs on a random part of each batch only, and counts b / k times for the k of b images (DINOv2).
    """

    def __init__(self, probability: float, *, subset: bool) -> None:
        super().__init__()
        self.probability = probability
        self.subset = subset

    def forward(self, tokens: Float[Tensor, "b n d"], branch: Branch, groups: Groups = ()) -> Float[Tensor, "b n d"]:
        """Tokens plus what the branch writes.

        Args:
            tokens: a batch, or a packed sequence.
            branch: maps tokens and their groups to what is added.
            groups: what is packed into the sequence; none for a batch.
        """
        if not self.training or self.probability == 0.0:
            return tokens + branch(tokens, groups)
        if self.subset and (groups or self.probability > SUBSET_ABOVE):
            return self.on_subset(tokens, branch, groups)
        return tokens + branch(tokens, groups) * self.kept(tokens, groups)

    def kept(self, tokens: Float[Tensor, "b n d"], groups: Groups) -> Float[Tensor, "b n 1"] | Float[Tensor, "b 1 1"]:
        """One over the kept share for every image that keeps the branch, 0 for the others."""
        share = 1.0 - self.probability
        if not groups:
            return tokens.new_empty(len(tokens), 1, 1).bernoulli_(share) / share
        factors = [tokens.new_empty(group.images).bernoulli_(share).repeat_interleave(group.tokens) for group in groups]
        return torch.cat(factors)[None, :, None] / share

    def on_subset(self, tokens: Float[Tensor, "b n d"], branch: Branch, groups: Groups) -> Float[Tensor, "b n d"]:
        """Run the branch on a random subset of every group."""
        sequence = tokens if groups else tokens.flatten(0, 1)[None]
        wanted, factors, chosen, start = [], [], [], 0
        for group in groups or (Group(*tokens.shape[:2]),):
            kept = min(max(int(group.images * (1.0 - self.probability)), 1), group.images)
            images = torch.randperm(group.images, device=tokens.device)[:kept]
            rows = images[:, None] * group.tokens + torch.arange(group.tokens, device=tokens.device)
            wanted.append(start + rows.flatten())
            factors.append(tokens.new_full((kept * group.tokens,), group.images / max(kept, 1)))
            chosen.append(group._replace(images=kept))
            start += group.length
        rows = torch.cat(wanted)
        inputs = sequence[:, rows]
        written = branch(
            inputs if groups else inputs.unflatten(1, (-1, tokens.shape[1]))[0], tuple(chosen) if groups else ()
        )
        scaled = written.reshape(1, len(rows), -1) * torch.cat(factors)[None, :, None]
        return sequence.index_add(1, rows, scaled.to(tokens.dtype)).reshape(tokens.shape)


class Block(nn.Module):
    """`x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = branch_scale(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp: FeedForward = FEED_FORWARDS[config.feed_forward](config)
        self.ls2 = branch_scale(config)
        self.drop_path = DropPath(drop_path, subset=config.stochastic_depth == "subset")

    def forward(
        self, tokens: Float[Tensor, "b n d"], rotation: Rotation | None = None, groups: Groups = ()
    ) -> Float[Tensor, "b n d"]:
        """Add what attention and MLP write to the residual stream.

        Args:
            tokens: a batch; or, with groups, all tokens of all their images in one sequence (b is 1).
            rotation: of the tokens of the batch; groups bring their own.
            groups: what is packed into the sequence, in order.
        """
        tokens = self.after_attention(tokens, rotation, groups)
        return self.drop_path(tokens, lambda kept, _: self.ls2(self.mlp(self.norm2(kept))), groups)

    def after_attention(
        self, tokens: Float[Tensor, "b n d"], rotation: Rotation | None = None, groups: Groups = ()
    ) -> Float[Tensor, "b n d"]:
        """The residual stream between attention and MLP."""
        return self.drop_path(
            tokens, lambda kept, packed: self.ls1(self.attn(self.norm1(kept), rotation, packed)), groups
        )


def branch_scale(config: ViTConfig) -> nn.Module:
    """LayerScale where the config asks for it."""
    return nn.Identity() if config.layer_scale is None else LayerScale(config.embed_dim, config.layer_scale)


def drop_path_rates(config: ViTConfig) -> list[float]:
    """Probability of dropping a branch in each block."""
    if config.drop_path_schedule == "constant":
        return [config.drop_path] * config.depth
    return torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
