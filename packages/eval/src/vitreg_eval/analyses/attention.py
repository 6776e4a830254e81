"""Attention maps of class token and registers (registers paper, figures 1, 8, 9 and 14)."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def prefix_maps(
    attention: Float[Tensor, "b h n n"], prefix: int, grid: tuple[int, int]
) -> Float[Tensor, "b prefix rows cols"]:
    """Where class token and registers look: mean over heads, patches only, each map summing to 1."""
    rows = attention.mean(dim=1)[:, :prefix, prefix:]
    maps = rows / rows.sum(dim=-1, keepdim=True)
    return rearrange(maps, "b prefix (rows cols) -> b prefix rows cols", rows=grid[0], cols=grid[1])


def peakiness(maps: Float[Tensor, "*b rows cols"]) -> Float[Tensor, "*b"]:
    """Largest over median value of each map: 1 for an even map, large for one with isolated peaks."""
    flat = maps.flatten(-2)
    return flat.max(dim=-1).values / flat.median(dim=-1).values
