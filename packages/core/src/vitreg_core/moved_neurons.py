"""MLPs some of whose hidden units fire at test-time registers alone, and attention biases in place of these."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_core.attention import Attention, Groups, Rotation, join_heads
from vitreg_core.config import MovedConfig, ViTConfig
from vitreg_core.errors import InputError
from vitreg_core.features import block_index
from vitreg_core.feed_forward import FeedForward

if TYPE_CHECKING:
    from vitreg_core.vit import VisionTransformer


def move_units(
    hidden: Float[Tensor, "b n hidden"], units: Int[Tensor, " u"], first: int, registers: int
) -> Float[Tensor, "b n hidden"]:
    """Let each unit fire at some tokens alone, with the greatest strength it has at any token of the image.

    Args:
        hidden: hidden units of an MLP; left as they are.
        units: those that are moved, each by itself; 0 at all other tokens.
        first: where the tokens stand at which they fire.
        registers: how many these are; with 0 the units fire nowhere.
    """
    moved = hidden.index_fill(2, units, 0.0)
    if registers:
        peaks = hidden[:, :, units].amax(dim=1, keepdim=True)
        moved[:, first : first + registers, units] = peaks.expand(-1, registers, -1)
    return moved


def index(units: Sequence[int]) -> Int[Tensor, " u"]:
    """Units as a tensor with values even where a model is built without."""
    return torch.tensor(units, device="cpu")


class MovedNeurons(FeedForward):
    """An MLP some of whose hidden units are moved to test-time registers."""

    units: Int[Tensor, " u"]

    def __init__(self, mlp: FeedForward, units: Sequence[int], first: int, registers: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.hidden_dim = mlp.hidden_dim
        self.first = first
        self.registers = registers
        self.register_buffer("units", index(units), persistent=False)  # u

    def hidden(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n hidden"]:
        """Hidden units, some of them moved."""
        return move_units(self.mlp.hidden(tokens), self.units, self.first, self.registers)

    def output(self, hidden: Float[Tensor, "b n hidden"]) -> Float[Tensor, "b n d"]:
        """What the hidden units write."""
        return self.mlp.output(hidden)


class BiasedAttention(Attention):
    """Attention of every head to a few constant keys and values besides the tokens (Sun et al., arXiv 2402.17762)."""

    def __init__(self, config: ViTConfig, biases: int) -> None:
        super().__init__(config)
        shape = (config.num_heads, biases, config.head_dim)
        self.bias_keys = nn.Parameter(torch.zeros(shape))  # h biases k
        self.bias_values = nn.Parameter(torch.zeros(shape))  # h biases k

    def forward(
        self, tokens: Float[Tensor, "b n d"], rotation: Rotation | None = None, groups: Groups = ()
    ) -> Float[Tensor, "b n d"]:
        """Mix the tokens of each image, and the biases."""
        assert not groups  # `VisionTransformer.packed` calls the model on each batch
        parts = self.prepare(self.qkv(tokens), rotation)
        keys, values = join(parts.keys, self.bias_keys), join(parts.values, self.bias_values)
        return self.proj(join_heads(F.scaled_dot_product_attention(parts.queries, keys, values)))

    def weights(self, tokens: Float[Tensor, "b n d"], rotation: Rotation | None = None) -> Float[Tensor, "b h n n"]:
        """Attention weights of the tokens; what is missing from 1 in a row went to the biases."""
        parts = self.prepare(self.qkv(tokens), rotation)
        keys = join(parts.keys, self.bias_keys)
        scores = parts.queries @ keys.transpose(-2, -1) * keys.shape[-1] ** -0.5
        return scores.softmax(dim=-1)[..., : tokens.shape[1]]


def join(tokens: Float[Tensor, "b h n k"], biases: Float[Tensor, "h biases k"]) -> Float[Tensor, "b h _ k"]:
    """Keys or values of the tokens, then those of the biases."""
    same = repeat(biases.to(tokens.dtype), "h biases k -> b h biases k", b=tokens.shape[0])
    return torch.cat([tokens, same], dim=2)


def by_layer(neurons: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """Units by block, each once."""
    return {layer: sorted({unit for at, unit in neurons if at == layer}) for layer in sorted({at for at, _ in neurons})}


def install(model: "VisionTransformer", moved: MovedConfig) -> None:
    """Replace the MLPs and attentions of a model by what its config says of moved neurons.

    Raises:
        InputError: neurons or registers that the model does not have.
    """
    if moved.registers + moved.first > len(model.prefix):
        raise InputError(
            f"test-time registers {moved.first} to {moved.first + moved.registers - 1} of {len(model.prefix)} tokens "
            "before the patches; mend moved in the config"
        )
    for layer, units in by_layer(moved.neurons).items():
        block = model.block(layer)
        check_units(layer, units, block.mlp.hidden_dim, model.depth)
        block.mlp = MovedNeurons(block.mlp, units, moved.first, moved.registers)
    for layer in range(model.depth if moved.biases else 0):
        plain, biased = model.block(layer).attn, BiasedAttention(model.config, moved.biases)
        biased.load_state_dict(plain.state_dict(), strict=False, assign=True)
        model.block(layer).attn = biased


def check_units(layer: int, units: Sequence[int], hidden_dim: int, depth: int) -> None:
    """Refuse neurons that are not there.

    Raises:
        InputError: names the first.
    """
    block_index(layer, depth)
    for unit in units:
        if not 0 <= unit < hidden_dim:
            raise InputError(f"unit {unit} of block {layer}, which has {hidden_dim}; use 0 to {hidden_dim - 1}")
