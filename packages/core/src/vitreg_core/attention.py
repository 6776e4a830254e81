"""Multi-head self-attention over the tokens of each image: one batch, or several packed into one sequence."""

import functools
import importlib.util
import logging
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_core.config import ViTConfig
from vitreg_core.features import QKV

SCORES_AT_ONCE = 2**21
"""On CPUs in bfloat16, plain matrix products on so many scores at a time (4 MB) stay in the cache."""
MANY_TOKENS = 640
"""Above so many tokens, scores are not kept for the backward pass, and compiled code takes heads one by one."""


class Rotation(NamedTuple):
    """Cosines and sines by which queries and keys of each token are rotated; 1 and 0 for tokens without a position."""

    cos: Float[Tensor, "n k"]
    sin: Float[Tensor, "n k"]


class Group(NamedTuple):
    """Images of one size in a packed sequence, one after another."""

    images: int
    tokens: int
    """Tokens of each image."""
    rotation: Rotation | None = None

    @property
    def length(self) -> int:
        """Tokens of all its images."""
        return self.images * self.tokens


Groups = tuple[Group, ...]


class Attention(nn.Module):
    """Softmax attention with one packed projection; rows of `qkv` are queries, keys, values, each head by head."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.q_norm = nn.LayerNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(
        self, tokens: Float[Tensor, "b n d"], rotation: Rotation | None = None, groups: Groups = ()
    ) -> Float[Tensor, "b n d"]:
        """Mix the tokens of each image.

        Args:
            tokens: a batch; or, with groups, all tokens of all their images in one sequence (b is 1).
            rotation: of the tokens of the batch; groups bring their own.
            groups: what is packed into the sequence, in order.
        """
        projected = self.qkv(tokens)
        if not groups:
            return self.proj(join_heads(attend(self.prepare(projected, rotation))))
        parts = [
            self.prepare(part, group.rotation) for part, group in zip(unpack(projected, groups), groups, strict=True)
        ]
        return self.proj(attend_packed(parts))

    def project(self, tokens: Float[Tensor, "b n d"]) -> QKV:
        """Queries, keys and values as projected: before norm, rotation and scale."""
        return self.split(self.qkv(tokens))

    def weights(self, tokens: Float[Tensor, "b n d"], rotation: Rotation | None = None) -> Float[Tensor, "b h n n"]:
        """Attention weights after the softmax, which the fused kernels of `forward` do not keep."""
        parts = self.prepare(self.qkv(tokens), rotation)
        scores = parts.queries @ parts.keys.transpose(-2, -1) * parts.queries.shape[-1] ** -0.5
        return scores.softmax(dim=-1)

    def prepare(self, projected: Float[Tensor, "b n d3"], rotation: Rotation | None) -> QKV:
        """Queries, keys and values as they meet: normed and rotated where the model does so."""
        parts = self.split(projected)
        queries, keys = self.q_norm(parts.queries), self.k_norm(parts.keys)
        return QKV(rotate(queries, rotation), rotate(keys, rotation), parts.values)

    def split(self, projected: Float[Tensor, "b n d3"]) -> QKV:
        """Name the parts of the packed projection."""
        return QKV(*rearrange(projected, "b n (three h k) -> three b h n k", three=3, h=self.num_heads))


def rotate(tokens: Float[Tensor, "b h n k"], rotation: Rotation | None) -> Float[Tensor, "b h n k"]:
    """Rotate pairs of channels, the i-th with the (i + k/2)-th, in the precision of the rotation."""
    if rotation is None:
        return tokens
    first, second = tokens.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (tokens * rotation.cos + turned * rotation.sin).to(tokens.dtype)


def attend(parts: QKV) -> Float[Tensor, "b h n k"]:
    """Softmax attention of one batch, by the fastest kernel at hand: the one place that chooses."""
    queries = parts.queries
    if fits_xformers(parts) and (kernels := xformers()) is not None:
        swapped = (part.transpose(1, 2) for part in (queries, parts.keys, parts.values))
        return kernels.memory_efficient_attention(*swapped).transpose(1, 2)
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16 and affords_scores(parts):
        return attend_by_products(parts)
    return F.scaled_dot_product_attention(queries, parts.keys, parts.values)


def fits_xformers(parts: QKV) -> bool:
    """Whether xFormers has a kernel: on CUDA, outside compiled code, for one number type of at most 32 bits."""
    kinds = {part.dtype for part in (parts.queries, parts.keys, parts.values)}
    return (
        parts.queries.is_cuda and not torch.compiler.is_compiling() and len(kinds) == 1 and torch.float64 not in kinds
    )


def affords_scores(parts: QKV) -> bool:
    """Whether no gradient is wanted, for which all scores would be kept, or few scores would be."""
    return parts.queries.shape[-2] <= MANY_TOKENS or not wants_gradient(parts)


def wants_gradient(parts: QKV) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in (parts.queries, parts.keys, parts.values))


def attend_by_products(parts: QKV) -> Float[Tensor, "b h n k"]:
    """Two plain matrix products with a softmax between, for as many heads at a time as the cache holds.

    torch's fused CPU kernel runs bfloat16 products at a fraction of the speed of plain ones. A compiled softmax between
    products would be turned back into that kernel, so it is written out, and divides after the second product.
    """
    images, heads, tokens, channels = parts.queries.shape
    keys = parts.keys * channels**-0.5
    if torch.compiler.is_compiling():
        pieces = heads if tokens > MANY_TOKENS else 1
        chunks = zip(*(part.chunk(pieces, dim=1) for part in (parts.queries, keys, parts.values)), strict=True)
        return torch.cat([written_out(*chunk) for chunk in chunks], dim=1)
    step = max(1, SCORES_AT_ONCE // tokens**2)
    queries, keys, values = (
        part.reshape(images * heads, tokens, channels) for part in (parts.queries, keys, parts.values)
    )
    if wants_gradient(parts):
        chunks = zip(queries.split(step), keys.split(step), values.split(step), strict=True)
        mixed = torch.cat([torch.bmm(torch.bmm(q, k.mT).softmax(dim=-1), v) for q, k, v in chunks])
    else:
        mixed = in_place(queries, keys, values, step)
    return mixed.view(images, heads, tokens, channels)


def in_place(
    queries: Float[Tensor, "heads n k"], keys: Float[Tensor, "heads n k"], values: Float[Tensor, "heads n k"], step: int
) -> Float[Tensor, "heads n k"]:
    """Attention of scaled keys, a number of heads at a time, with one piece of memory for all scores."""
    mixed, count = torch.empty_like(queries), len(queries)
    memory = queries.new_empty(min(step, count), queries.shape[1], queries.shape[1])
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        scores = memory[: min(step, count - start)]
        torch.bmm(queries[chunk], keys[chunk].mT, out=scores)
        torch.softmax(scores, dim=-1, out=scores)
        torch.bmm(scores, values[chunk], out=mixed[chunk])
    return mixed


def written_out(
    queries: Float[Tensor, "b h n k"], keys: Float[Tensor, "b h n k"], values: Float[Tensor, "b h n k"]
) -> Float[Tensor, "b h n k"]:
    """Attention of scaled keys, with the parts of the softmax one by one."""
    scores = queries @ keys.transpose(-2, -1)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp().to(values.dtype)
    return (weights @ values) / weights.sum(dim=-1, keepdim=True)


def attend_packed(parts: Sequence[QKV]) -> Float[Tensor, "1 n d"]:
    """Attention of several batches, as one sequence: one masked call under xFormers, one call per batch elsewhere."""
    if fits_xformers(parts[0]) and (kernels := xformers()) is not None:
        lengths = tuple(part.queries.shape[2] for part in parts for _ in range(len(part.queries)))
        packed = (
            torch.cat([rearrange(getattr(part, name), "b h n k -> 1 (b n) h k") for part in parts], dim=1)
            for name in ("queries", "keys", "values")
        )
        mixed = kernels.memory_efficient_attention(*packed, attn_bias=block_diagonal(lengths))
        return rearrange(mixed, "1 n h k -> 1 n (h k)")
    return pack([join_heads(attend(part)) for part in parts])


def join_heads(mixed: Float[Tensor, "b h n k"]) -> Float[Tensor, "b n d"]:
    """Concatenate what the heads give for each token."""
    return rearrange(mixed, "b h n k -> b n (h k)")


def pack(batches: Sequence[Float[Tensor, "_ _ d"]]) -> Float[Tensor, "1 n d"]:
    """All tokens of all images in one sequence."""
    return torch.cat([rearrange(tokens, "b n d -> 1 (b n) d") for tokens in batches], dim=1)


def unpack(packed: Float[Tensor, "1 n d"], groups: Groups) -> list[Float[Tensor, "_ _ d"]]:
    """The batches of a packed sequence."""
    parts = packed.split([group.length for group in groups], dim=1)
    return [rearrange(part, "1 (b n) d -> b n d", n=group.tokens) for part, group in zip(parts, groups, strict=True)]


@functools.cache
def xformers() -> ModuleType | None:
    """XFormers' operators where they can be used; imported at the first call on a CUDA device, without its warnings."""
    if not torch.cuda.is_available() or importlib.util.find_spec("xformers") is None:
        return None
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("xformers.ops")
    except (ImportError, OSError):  # built for another CUDA or flash-attention than the installed ones
        return None
    finally:
        logger.setLevel(level)


@functools.lru_cache(maxsize=64)
def block_diagonal(lengths: tuple[int, ...]) -> object:
    """XFormers' mask that keeps the images of a packed sequence apart."""
    return importlib.import_module("xformers.ops.fmha.attn_bias").BlockDiagonalMask.from_seqlens(lengths)
