"""What the adapters of all libraries share: everything is read off the library's own forward pass."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vitreg_core.capturing import Anatomy, Arguments, Captured, Enough, find, record
from vitreg_core.data.images import Preprocess
from vitreg_core.errors import InputError
from vitreg_core.features import QKV, Features, block_index, name_tokens


class Shape(NamedTuple):
    """The numbers of a model that the protocol names."""

    patch_size: int
    embed_dim: int
    num_heads: int
    class_token: bool
    num_registers: int


class UnknownPreprocess(Preprocess):
    """Stands where a model does not carry its preprocessing: every use of it says so."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (as in object)
        """Answer for the config that is missing."""
        if name == "config":
            raise InputError(f"{self.reason}; give as_backbone(model, preprocess=PreprocessConfig(...))")
        raise AttributeError(name)


class Adapter(Anatomy, nn.Module):
    """A model of another library as a `Backbone`. `model` is the original itself; `source` says where it comes from."""

    source: str = ""
    patches_path: str
    blocks_path: str
    norm_path: str

    def __init__(self, model: nn.Module, shape: Shape, preprocess: Preprocess) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.patch_size = shape.patch_size
        self.embed_dim = shape.embed_dim
        self.num_heads = shape.num_heads
        self.class_token = shape.class_token
        self.num_registers = shape.num_registers

    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Features:
        """Tokens after the final norm."""
        return self.features(images)

    @abstractmethod
    def run(self, images: Float[Tensor, "b 3 height width"]) -> None:
        """Run the blocks on images of a size that `fit` let through."""

    @property
    @abstractmethod
    def native(self) -> tuple[int, int] | None:
        """Height and width of the images that the model was built for; None where every size is the same to it."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in order."""
        return list(find(self.model, self.blocks_path, "blocks").children())

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def prefix(self) -> tuple[Literal["cls", "register"], ...]:
        """Kinds of the tokens before the patches, in order."""
        return (*(("cls",) if self.class_token else ()), *("register" for _ in range(self.num_registers)))

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches."""
        return len(self.prefix)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def features(self, images: Float[Tensor, "b 3 height width"]) -> Features:
        """Tokens after the final norm."""
        return self.intermediate(images, [-1])[0]

    def intermediate(
        self, images: Float[Tensor, "b 3 height width"], layers: Sequence[int], *, norm: bool = True
    ) -> list[Features]:
        """Tokens after each named block, in the order named; `norm` applies the final norm to each.

        Raises:
            InputError: a block that the model does not have, images that it does not take, or no final norm of tokens.
        """
        grid = self.grid(images)
        after = self.look(images, layers, "after").after
        return [self.named(self.final_norm(after[layer]) if norm else after[layer], grid) for layer in layers]

    def qkv(self, images: Float[Tensor, "b 3 height width"], layer: int) -> QKV:
        """Queries, keys and values of a block as projected."""
        seen = self.look(images, [layer], "queries", "keys", "values")
        return QKV(seen.queries[layer], seen.keys[layer], seen.values[layer])

    def attention(self, images: Float[Tensor, "b 3 height width"], layer: int) -> Float[Tensor, "b h n n"]:
        """Attention weights of a block; rows are queries and sum to 1."""
        return self.look(images, [layer], "attention").attention[layer]

    def hidden(self, images: Float[Tensor, "b 3 height width"], layer: int) -> Float[Tensor, "b n hidden"]:
        """Hidden units of a block's MLP as its last layer reads them."""
        return self.look(images, [layer], "hidden").hidden[layer]

    def embeddings(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b p d"]:
        """Patch embeddings before positions are added."""
        return self.embed(self.fit(images))

    def embed(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b p d"]:
        """Patch embeddings of images that `fit` let through."""
        return rearrange(self.patches(images), "b d rows cols -> b (rows cols) d")

    @property
    def patches(self) -> nn.Module:
        """The convolution that embeds the patches."""
        return find(self.model, self.patches_path, "patch embedding")

    def look(self, images: Float[Tensor, "b 3 height width"], layers: Sequence[int], *parts: str) -> Captured:
        """Record parts of some blocks in one forward pass; gradients flow through them.

        What the last attention reads needs no more than that: later layers are not run.
        """
        chosen = [block_index(layer, self.depth) for layer in layers]
        stop = set(parts) <= {"before", "queries", "keys", "values"} and set(parts) != {"before"}
        with record(self, chosen, parts, detached=False, stop=stop) as captured, suppress(Enough):
            self.run(self.fit(images))
        return captured

    def grid(self, images: Float[Tensor, "b 3 height width"]) -> tuple[int, int]:
        """Rows and columns of patches.

        Raises:
            InputError: the images are smaller than one patch.
        """
        height, width = images.shape[-2:]
        if min(height, width) < self.patch_size:
            raise InputError(
                f"image of {height}x{width} pixels is smaller than one patch of {self.patch_size}; give larger images"
            )
        return height // self.patch_size, width // self.patch_size

    def fit(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b 3 _ _"]:
        """Images in the precision of the weights, without the pixels beyond the last whole patch."""
        rows, cols = self.grid(images)
        images = images.to(next(self.patches.parameters()).dtype)
        if images.shape[-2:] == self.native:
            return images
        return images[:, :, : rows * self.patch_size, : cols * self.patch_size]

    def final_norm(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The final norm of all tokens."""
        return find(self.model, self.norm_path, "final norm")(tokens)

    def named(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Features:
        """Tokens by kind."""
        expected = len(self.prefix) + grid[0] * grid[1]
        if tokens.shape[1] != expected:
            raise InputError(
                f"{type(self.model).__name__} gave {tokens.shape[1]} tokens for {expected}; "
                "put it into evaluation mode, so that no patches are dropped"
            )
        return name_tokens(tokens, self.prefix, grid)


def meet(queries: Float[Tensor, "b h n k"], keys: Float[Tensor, "b h n k"]) -> Float[Tensor, "b h n n"]:
    """Attention weights of queries and keys after norms and rotation."""
    return (queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5).softmax(dim=-1)


def split_heads(tokens: Float[Tensor, "b n hk"], head_dim: int) -> Float[Tensor, "b h n k"]:
    """Channels by head."""
    return rearrange(tokens, "b n (h k) -> b h n k", k=head_dim)


def count_heads(block: nn.Module) -> int:
    """Heads of a block's `attn`.

    Raises:
        InputError: the block has none, or one of an unknown kind.
    """
    heads = getattr(getattr(block, "attn", None), "num_heads", None)
    if heads is None:
        raise InputError(
            f"{type(block).__name__} has no attn that tells its number of heads; give a model of plain blocks"
        )
    return heads


def refuse_masks(arguments: Arguments) -> None:
    """Refuse attention that leaves out tokens.

    Raises:
        InputError: a call with a mask.
    """
    for name in ("attn_mask", "attention_mask"):
        if arguments.get(name) is not None:
            raise InputError(f"attention with {name} is not captured; run the model on images without it")


def side(patch_size: int | Sequence[int]) -> int:
    """Side of a square patch.

    Raises:
        InputError: patches are not square.
    """
    sides = {patch_size} if isinstance(patch_size, int) else set(patch_size)
    if len(sides) > 1:
        raise InputError(f"patches of {tuple(sides)} pixels are not square; give a model with square ones")
    return sides.pop()


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
