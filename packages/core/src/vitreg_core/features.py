"""What a model gives, and what evaluation may ask of any model: the contract between the packages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from vitreg_core.errors import InputError

if TYPE_CHECKING:
    from vitreg_core.data.images import Preprocess


@dataclass(frozen=True)
class Features:
    """The tokens of a batch of images, by kind."""

    cls: Float[Tensor, "b d"] | None
    """Class token; None for a model without one."""
    registers: Float[Tensor, "b r d"]
    """Register tokens; r is 0 for a model without any."""
    patches: Float[Tensor, "b p d"]
    """Patch tokens, row by row."""
    grid: tuple[int, int]
    """Rows and columns of patches; their product is p."""

    @property
    def tokens(self) -> Float[Tensor, "b n d"]:
        """All tokens as the blocks see them: class token, registers, patches."""
        cls = self.patches[:, :0] if self.cls is None else self.cls[:, None]
        return torch.cat([cls, self.registers, self.patches], dim=1)

    @property
    def patch_map(self) -> Float[Tensor, "b d rows cols"]:
        """Patch tokens as a feature map."""
        rows, cols = self.grid
        return rearrange(self.patches, "b (rows cols) d -> b d rows cols", rows=rows, cols=cols)


torch.export.register_dataclass(Features, serialized_type_name="vitreg_core.Features")  # so that programs may return it


def name_tokens(
    tokens: Float[Tensor, "b n d"], prefix: Sequence[Literal["cls", "register"]], grid: tuple[int, int]
) -> Features:
    """Name the tokens of a sequence by kind: class token, registers, patches."""
    first = prefix.count("cls")
    return Features(
        cls=tokens[:, 0] if first else None,
        registers=tokens[:, first : len(prefix)],
        patches=tokens[:, len(prefix) :],
        grid=grid,
    )


def block_index(layer: int, depth: int) -> int:
    """Block number from 0.

    Raises:
        InputError: a block that a model of this depth does not have.
    """
    if not -depth <= layer < depth:
        raise InputError(f"layer {layer} of a model with {depth} blocks; use 0 to {depth - 1}, or -1 for the last")
    return layer % depth


@dataclass(frozen=True)
class QKV:
    """Queries, keys and values of one attention layer, before any scaling; all tokens, prefix tokens first."""

    queries: Float[Tensor, "b h n k"]
    keys: Float[Tensor, "b h n k"]
    values: Float[Tensor, "b h n k"]


@runtime_checkable
class Backbone(Protocol):
    """What evaluation knows of a model. Blocks count from 0; -1 is the last.

    `images` are normalised pixels `b 3 height width`. Token order is class token, registers, patches;
    `num_prefix_tokens` is how many stand before the patches.
    """

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""

    @property
    def embed_dim(self) -> int:
        """Width of a token."""

    @property
    def depth(self) -> int:
        """Number of blocks."""

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""

    @property
    def num_registers(self) -> int:
        """Register tokens."""

    @property
    def prefix(self) -> tuple[Literal["cls", "register"], ...]:
        """Kinds of the tokens before the patches, in order."""

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers."""

    @property
    def preprocess(self) -> "Preprocess":
        """How the checkpoint expects its images."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def features(self, images: Float[Tensor, "b 3 height width"]) -> Features:
        """Tokens after the final norm."""

    def intermediate(
        self, images: Float[Tensor, "b 3 height width"], layers: Sequence[int], *, norm: bool = True
    ) -> list[Features]:
        """Tokens after each named block, in the order named; `norm` applies the final norm to each."""

    def qkv(self, images: Float[Tensor, "b 3 height width"], layer: int) -> QKV:
        """Output of the qkv projection of a block."""

    def attention(self, images: Float[Tensor, "b 3 height width"], layer: int) -> Float[Tensor, "b h n n"]:
        """Attention weights of a block after the softmax; rows are queries and sum to 1."""

    def hidden(self, images: Float[Tensor, "b 3 height width"], layer: int) -> Float[Tensor, "b n hidden"]:
        """Hidden units of a block's MLP after the activation."""

    def embeddings(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b p d"]:
        """Patch embeddings before positions are added."""
