"""Models whose register neurons are moved off the patches, without training (Jiang et al. 2025, arXiv 2506.08010)."""

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, overload

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitreg_core.backbones import as_backbone
from vitreg_core.backbones.adapter import Adapter
from vitreg_core.capturing import bind, find
from vitreg_core.config import MovedConfig, override
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone, block_index
from vitreg_core.moved_neurons import BiasedAttention, by_layer, check_units, index, install, move_units
from vitreg_core.register_neurons import Neuron, RegisterNeurons
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights.files import weights_hash

Batches = Float[Tensor, "b 3 height width"] | Iterable[Float[Tensor, "_ 3 _ _"]]
"""Normalised pixels: one batch, or batches that can be gone through more than once, in the same order."""


@overload
def with_test_time_registers(
    model: VisionTransformer, neurons: RegisterNeurons | Sequence[Neuron], tokens: int | None = None
) -> VisionTransformer: ...
@overload
def with_test_time_registers(
    model: nn.Module | Backbone, neurons: RegisterNeurons | Sequence[Neuron], tokens: int | None = None
) -> VisionTransformer | Adapter: ...
def with_test_time_registers(
    model: nn.Module | Backbone, neurons: RegisterNeurons | Sequence[Neuron], tokens: int | None = None
) -> VisionTransformer | Adapter:
    """Copy a model and give it untrained registers that take over what the given neurons do to patches.

    The registers start as zeros, have no position and stand after the model's own. At each of them every neuron fires
    with the strength it would have reached at any token, and nowhere else: each image of a batch by itself, and each
    neuron by itself (Algorithm 2 of the paper). Several registers hold the same; other tokens then attend to them as
    they did to several outliers, which on a ViT-Ti keeps the accuracy that a single one loses.

    A vitreg model is edited as such: it can be compiled, saved, loaded and exported. A model of timm, transformers or
    open_clip stays in its own code, behind the `Backbone` protocol. Test-time registers count among the registers.

    Args:
        model: left as it is.
        neurons: from `find_register_neurons` on this very model, or the units that write the outliers, at least one.
        tokens: how many registers; as many as were found to be typical, or 1 for neurons without that.

    Returns:
        A model with more registers, in evaluation mode; its `source` says what was added.

    Raises:
        InputError: no neurons, one that the model does not have, neurons that were found in another model, or a model
            that was edited before.
    """
    backbone = original(model)
    chosen = check_neurons(backbone, neurons)
    count = usual(neurons) if tokens is None else tokens
    if count < 1:
        raise InputError(f"tokens={count}: give one test-time register or more")
    if isinstance(backbone, VisionTransformer):
        moved = MovedConfig(neurons=chosen, first=backbone.num_prefix_tokens, registers=count, biases=0)
        return rebuild(backbone, moved, f"{count} test-time register{'s' * (count > 1)}")
    return edit_foreign(backbone, chosen, count)


@torch.no_grad()
def with_attention_bias(
    model: nn.Module | Backbone,
    neurons: RegisterNeurons | Sequence[Neuron],
    images: Batches,
    tokens: int | None = None,
) -> VisionTransformer:
    """Copy a model and let every head attend to constant keys and values in place of test-time registers.

    The neurons fire nowhere, and the keys and values that a test-time register has on average over the images join
    those of the tokens in every block. No token is added, so the outputs have the shapes of the model's own; rows of
    its attention weights sum to less than 1, as the constants take their share.

    Args:
        model: a vitreg model, left as it is.
        neurons: as for `with_test_time_registers`.
        images: normalised pixels, 100 or more of the kind the model is for.
        tokens: how many pairs of a key and a value; as for `with_test_time_registers`.

    Raises:
        InputError: a model of another library, no images, and as `with_test_time_registers`.
    """
    backbone = original(model)
    if not isinstance(backbone, VisionTransformer):
        raise InputError(
            f"attention biases need vitreg's own attention, not that of {type(backbone.model).__name__}; open the "
            "weights by load_model, or take with_test_time_registers"
        )
    registers = with_test_time_registers(backbone, neurons, tokens)
    keys, values = mean_keys_and_values(registers, images)
    moved = registers.config.moved
    assert moved is not None
    biases = override(moved, {"first": 0, "registers": 0, "biases": moved.registers})
    edited = rebuild(backbone, biases, f"{moved.registers} attention bias{'es' * (moved.registers > 1)}")
    for layer in range(edited.depth):
        attention = edited.block(layer).attn
        assert isinstance(attention, BiasedAttention)
        attention.bias_keys.copy_(keys[layer])
        attention.bias_values.copy_(values[layer])
    return edited


def original(model: nn.Module | Backbone) -> VisionTransformer | Adapter:
    """A model that was not edited.

    Raises:
        InputError: it was, or it is no known model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"{type(model).__name__} is no torch module, so it cannot be edited; give a model")
    backbone = as_backbone(model)
    moved = backbone.config.moved if isinstance(backbone, VisionTransformer) else has_moved(backbone)
    if moved:
        raise InputError("this model has moved neurons already; give all neurons to the original model at once")
    return backbone


def has_moved(model: Adapter) -> bool:
    """Whether `edit_foreign` made it."""
    return any(name.endswith("moved_units") for name, _ in model.named_buffers())


def usual(neurons: RegisterNeurons | Sequence[Neuron]) -> int:
    """How many registers the neurons take."""
    return neurons.tokens if isinstance(neurons, RegisterNeurons) else 1


def check_neurons(
    model: VisionTransformer | Adapter, neurons: RegisterNeurons | Sequence[Neuron]
) -> tuple[tuple[int, int], ...]:
    """Block and unit of each neuron, from 0.

    Raises:
        InputError: there are none, or they are not of this model.
    """
    if isinstance(neurons, RegisterNeurons):
        if neurons.cutoff is None:
            raise InputError(f"{neurons.source or 'this model'}: {neurons.verdict}; use the model as it is")
        if neurons.weights != weights_hash(model):
            raise InputError(
                f"these neurons were found in {neurons.source or '(unnamed)'}, whose weights differ from those of "
                f"{model.source or '(unnamed)'}; find them in this model"
            )
        neurons = neurons.neurons
    if not neurons:
        raise InputError("0 neurons given; name at least one (layer, unit) that writes the outliers")
    chosen = tuple((block_index(layer, model.depth), unit) for layer, unit in neurons)
    for layer, units in by_layer(chosen).items():
        check_units(layer, units, hidden_dim(model, layer), model.depth)
    return chosen


def hidden_dim(model: VisionTransformer | Adapter, layer: int) -> int:
    """Hidden units of a block's MLP.

    Raises:
        InputError: they cannot be reached.
    """
    if isinstance(model, VisionTransformer):
        return model.block(layer).mlp.hidden_dim
    return hidden_linear(model, layer).weight.shape[1]


def hidden_linear(model: Adapter, layer: int) -> Any:  # noqa: ANN401 (a linear layer of any library)
    """The linear layer that reads the hidden units of a block's MLP.

    Raises:
        InputError: the block has none.
    """
    return find(model.blocks[layer], model.hidden_path, "hidden units")


def rebuild(model: VisionTransformer, moved: MovedConfig, added: str) -> VisionTransformer:
    """A vitreg model with the same weights, more registers, and moved neurons."""
    config = override(model.config, {"registers": model.num_registers + moved.registers})
    edited = VisionTransformer(config, model.preprocess.config, source=f"{model.source} + {added}")
    tensors = model.state_dict()
    zeros = tensors["registers.tokens"].new_zeros(moved.registers, model.embed_dim)
    edited.load_state_dict({**tensors, "registers.tokens": torch.cat([tensors["registers.tokens"], zeros])})
    edited.config = override(config, {"moved": moved})
    install(edited, moved)
    return edited.to(model.device, model.patch_embed.proj.weight.dtype).eval()


def edit_foreign(model: Adapter, neurons: Sequence[tuple[int, int]], count: int) -> Adapter:
    """A copy of a model of another library with registers after its prefix, and hooks that move neurons to them."""
    edited, first = copy.deepcopy(model).eval(), model.num_prefix_tokens
    edited.source = f"{model.source} + {count} test-time register{'s' * (count > 1)}"
    edited.num_registers += count
    insert_tokens(edited.blocks[0], first, count)
    count_tokens(edited, first, count)
    for block in edited.blocks:
        attention = find(block, edited.attention_path, "attention")
        if isinstance(getattr(attention, "num_prefix_tokens", None), int):  # timm's, which rotates all but these
            attention.num_prefix_tokens = first + count  # type: ignore[assignment]
    for layer, units in by_layer(neurons).items():
        move_at(hidden_linear(edited, layer), units, first, count)
    return edited


def insert_tokens(block: nn.Module, first: int, count: int) -> RemovableHandle:
    """Let a block read so many zeros after the first tokens."""

    def insert(
        block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name, tokens = next(iter(bind(block, args, kwargs).items()))
        zeros = tokens.new_zeros(tokens.shape[0], count, tokens.shape[2])
        longer = torch.cat([tokens[:, :first], zeros, tokens[:, first:]], dim=1)
        return ((longer, *args[1:]), kwargs) if args else ((), {**kwargs, name: longer})

    return block.register_forward_pre_hook(insert, with_kwargs=True)


def count_tokens(model: Adapter, first: int, count: int) -> None:
    """Let timm's model know of the new tokens, so that what it pools leaves them out.

    Positions have no rows for them: while timm resizes these, before the first block, it must not count the new ones.
    """
    inner: Any = model.model
    if isinstance(getattr(inner, "num_reg_tokens", None), int):
        inner.num_reg_tokens += count
    if isinstance(getattr(inner, "num_prefix_tokens", None), int):
        inner.num_prefix_tokens = first + count
        inner.patch_embed.register_forward_pre_hook(partial(set_prefix, inner, first))
        model.blocks[0].register_forward_pre_hook(partial(set_prefix, inner, first + count))


def set_prefix(model: Any, number: int, _module: nn.Module, _args: tuple[Any, ...]) -> None:  # noqa: ANN401 (timm's)
    """Tell a model how many tokens stand before the patches."""
    model.num_prefix_tokens = number


def move_at(linear: nn.Module, units: Sequence[int], first: int, count: int) -> RemovableHandle:
    """Let a linear layer read hidden units some of which are moved."""
    linear.register_buffer("moved_units", index(units).to(next(linear.parameters()).device), persistent=False)

    def move(linear: nn.Module, args: tuple[Any, ...]) -> Tensor:
        return move_units(args[0], linear.moved_units, first, count)  # type: ignore[arg-type]

    return linear.register_forward_pre_hook(move)


def batches_of(images: Batches, size: int = 32) -> Iterable[Float[Tensor, "_ 3 _ _"]]:
    """Images in batches; batches as they are.

    Raises:
        InputError: something that can be gone through once only.
    """
    if isinstance(images, Tensor):
        return images.split(size)
    if iter(images) is images:
        raise InputError(
            f"images come as a {type(images).__name__}, which ends after one pass; give a tensor or a list of batches"
        )
    return images


def mean_keys_and_values(
    model: VisionTransformer, images: Batches
) -> tuple[Float[Tensor, "depth h r k"], Float[Tensor, "depth h r k"]]:
    """Keys, as they meet the queries, and values of the test-time registers in every block, on average over images."""
    moved, total, seen = model.config.moved, [torch.zeros(()) for _ in range(model.depth)], 0
    assert moved is not None

    def watch(layer: int) -> RemovableHandle:
        def add(attention: Any, args: tuple[Any, ...]) -> None:  # noqa: ANN401 (ours)
            parts = attention.prepare(attention.qkv(args[0]), args[1])
            both = torch.stack([parts.keys, parts.values])[..., moved.first : moved.first + moved.registers, :]
            total[layer] = total[layer] + both.double().sum(dim=1).cpu()

        return model.block(layer).attn.register_forward_pre_hook(add)

    handles = [watch(layer) for layer in range(model.depth)]
    try:
        for batch in batches_of(images):
            model(batch.to(model.device))
            seen += len(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise InputError("no images to take mean keys and values over; give 100 or more")
    keys, values = rearrange(torch.stack(total) / seen, "depth two h r k -> two depth h r k")
    return keys, values
