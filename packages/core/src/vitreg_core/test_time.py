"""Test-time registers: keep outliers off the patches without training (Jiang et al. 2025, arXiv 2506.08010)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_core.feed_forward import FeedForward
from vitreg_core.vit import VisionTransformer


class Neuron(NamedTuple):
    """One hidden unit of one block's MLP; both count from 0."""

    layer: int
    unit: int


class MovedNeurons(FeedForward):
    """An MLP some of whose hidden units fire at one token only, with the strength they would have reached anywhere."""

    units: Int[Tensor, " u"]

    def __init__(self, mlp: FeedForward, units: Sequence[int], token: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.hidden_dim = mlp.hidden_dim
        self.token = token
        self.register_buffer("units", torch.tensor(units), persistent=False)  # u

    def hidden(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n hidden"]:
        """Hidden units: each moved unit is its maximum over all tokens at one token, and 0 at the others."""
        hidden = self.mlp.hidden(tokens)
        peaks = hidden[:, :, self.units].amax(dim=1)
        moved = hidden.index_fill(2, self.units, 0.0)
        moved[:, self.token, self.units] = peaks
        return moved

    def output(self, hidden: Float[Tensor, "b n hidden"]) -> Float[Tensor, "b n d"]:
        """What the hidden units write."""
        return self.mlp.output(hidden)


def add_test_time_register(model: VisionTransformer, neurons: Sequence[Neuron]) -> VisionTransformer:
    """Copy a model and give it one untrained register that takes over what the given neurons do to patches.

    The register starts as zeros, has no position and stands after the model's own registers. Each image of a batch is
    edited on its own, and each neuron on its own (Algorithm 2 of the paper).

    Args:
        model: left as it is.
        neurons: the units that write the outliers, at least one.

    Returns:
        A model with one more register, in evaluation mode; its `source` says what was added.

    Raises:
        InputError: no neurons, or one that the model does not have.
    """
    check_neurons(model, neurons)
    config = override(model.config, {"registers": model.num_registers + 1})
    edited = VisionTransformer(config, model.preprocess.config, source=f"{model.source} + test-time register")
    tensors = model.state_dict()
    tensors["registers.tokens"] = torch.cat(
        [tensors["registers.tokens"], tensors["registers.tokens"].new_zeros(1, model.embed_dim)]
    )
    edited.load_state_dict(tensors)
    for layer in sorted({neuron.layer for neuron in neurons}):
        units = sorted({neuron.unit for neuron in neurons if neuron.layer == layer})
        block = edited.block(layer)
        block.mlp = MovedNeurons(block.mlp, units, token=edited.num_prefix_tokens - 1)
    return edited.to(model.device).eval()


def check_neurons(model: VisionTransformer, neurons: Sequence[Neuron]) -> None:
    """Refuse neurons that are not there."""
    if any(isinstance(block.mlp, MovedNeurons) for block in map(model.block, range(model.depth))):
        raise InputError("this model has moved neurons already; give all neurons to the original model at once")
    if not neurons:
        raise InputError("0 neurons given; name at least one (layer, unit) that writes the outliers")
    for neuron in neurons:
        units = model.block(neuron.layer).mlp.hidden_dim
        if not 0 <= neuron.unit < units:
            raise InputError(f"unit {neuron.unit} of block {neuron.layer}, which has {units}; use 0 to {units - 1}")
