"""Looking inside: tokens, queries, keys, values, attention and hidden units of any block, taken while a model runs."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitreg_core.attention import Attention
from vitreg_core.config import nearest
from vitreg_core.errors import InputError
from vitreg_core.features import QKV, Backbone, block_index
from vitreg_core.vit import VisionTransformer

Part = Literal["before", "after", "queries", "keys", "values", "attention", "hidden"]
PARTS: tuple[Part, ...] = get_args(Part)
Arguments = Mapping[str, Any]
"""What a module is called with, by name, in the order of its signature; tokens come first."""


class Anatomy(ABC):
    """Where a model keeps what can be looked at."""

    attention_path: str
    """The attention of a block, as a dotted name; alternatives are separated by bars."""
    hidden_path: str
    """The linear layer of a block's MLP that reads the hidden units."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in order."""

    @abstractmethod
    def project(self, attention: nn.Module, tokens: Float[Tensor, "b n d"]) -> QKV:
        """Queries, keys and values as projected."""

    @abstractmethod
    def weights(self, attention: nn.Module, arguments: Arguments) -> Float[Tensor, "b h n n"]:
        """Attention weights of a call of the attention, as it computes them."""


class Native(Anatomy):
    """Our own model."""

    attention_path = "attn"
    hidden_path = "mlp.fc2|mlp.w3|mlp.mlp.fc2|mlp.mlp.w3"  # the last two: within `MovedNeurons`

    def __init__(self, model: VisionTransformer) -> None:
        self.model = model

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in order."""
        return list(self.model.blocks)

    def project(self, attention: nn.Module, tokens: Float[Tensor, "b n d"]) -> QKV:
        """Queries, keys and values as projected."""
        assert isinstance(attention, Attention)
        return attention.project(tokens)

    def weights(self, attention: nn.Module, arguments: Arguments) -> Float[Tensor, "b h n n"]:
        """Attention weights, after the norms and the rotation of the model."""
        assert isinstance(attention, Attention)
        return attention.weights(arguments["tokens"], arguments.get("rotation"))


class Layers(Mapping[int, Tensor]):
    """One part of the captured blocks, by block number; -1 is the last.

    What several forward passes gave stands one after another along the batch.
    """

    def __init__(self, part: Part, layers: Sequence[int], depth: int) -> None:
        self.part = part
        self.depth = depth
        self.passes: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def __getitem__(self, layer: int) -> Tensor:
        """The part of a block.

        Raises:
            InputError: not captured, no forward pass yet, or passes that differ in their number of tokens.
        """
        passes = self.passes.get(block_index(layer, self.depth))
        if passes is None:
            raise InputError(
                f"{self.part} of layer {layer} was not captured; name both in capture(model, layers, parts)"
            )
        if not passes:
            raise InputError(f"{self.part} of layer {layer}: no forward pass yet; run the model inside the with block")
        if len({one.shape[1:] for one in passes}) > 1:
            shapes = " and ".join(str(tuple(one.shape)) for one in passes[:2])
            raise InputError(f"{self.part} of layer {layer} has shapes {shapes}; capture images of one size at a time")
        if len(passes) > 1:
            passes[:] = [torch.cat(passes)]
        return passes[0]

    def __iter__(self) -> Iterator[int]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and (layer + self.depth if layer < 0 else layer) in self.passes


class Captured:
    """What was captured: one `Layers` for each part."""

    def __init__(self, layers: Sequence[int], parts: Sequence[str], depth: int) -> None:
        by_part = {part: Layers(part, layers if part in parts else (), depth) for part in PARTS}
        self.before = by_part["before"]
        """Tokens that a block reads, `b n d`."""
        self.after = by_part["after"]
        """Tokens that a block gives, `b n d`; the residual stream, before the final norm."""
        self.queries = by_part["queries"]
        """Queries as projected, `b h n k`; before norm, rotation and scale."""
        self.keys = by_part["keys"]
        """Keys as projected, `b h n k`; before norm and rotation."""
        self.values = by_part["values"]
        """Values, `b h n k`."""
        self.attention = by_part["attention"]
        """Attention weights, `b h n n`, after norms, rotation and softmax; rows are queries and sum to 1."""
        self.hidden = by_part["hidden"]
        """Hidden units of the MLP as its last layer reads them, `b n hidden`."""


class Enough(Exception):  # noqa: N818 (nothing went wrong)
    """All that was wanted has been recorded, so that the rest of the forward pass need not run."""


class Recorder:
    """The hooks of one block."""

    stops = False
    """Whether the forward pass ends at the projection of this block."""

    def __init__(
        self, anatomy: Anatomy, layer: int, captured: Captured, device: torch.device | str | None, *, detached: bool
    ) -> None:
        self.anatomy = anatomy
        self.layer = layer
        self.captured = captured
        self.device = device
        self.detached = detached

    def install(self) -> Iterator[RemovableHandle]:
        """Register the hooks that the wanted parts need.

        Raises:
            InputError: the block lacks a part.
        """
        block = self.anatomy.blocks[self.layer]
        yield block.register_forward_pre_hook(self.enter_block, with_kwargs=True)
        if self.wants("after"):
            yield block.register_forward_hook(self.leave_block)
        if self.wants("queries", "keys", "values", "attention"):
            attention = find(block, self.anatomy.attention_path, "queries, keys, values and attention")
            yield attention.register_forward_pre_hook(self.enter_attention, with_kwargs=True)
        if self.wants("hidden"):
            linear = find(block, self.anatomy.hidden_path, "hidden units")
            yield linear.register_forward_pre_hook(self.enter_linear)

    def wants(self, *parts: Part) -> bool:
        """Whether one of these parts of the block is to be captured."""
        return any(self.layer in getattr(self.captured, part) for part in parts)

    def keep(self, part: Part, values: Tensor) -> None:
        """Store what one forward pass gave, if it is wanted."""
        if self.wants(part) and not replaying():
            values = values.detach() if self.detached else values
            getattr(self.captured, part).passes[self.layer].append(values.to(self.device or values.device))

    def enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the tokens before a block."""
        arguments = bind(block, args, kwargs)
        refuse_packed(arguments)
        self.keep("before", next(iter(arguments.values())))

    def leave_block(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG002 (torch's signature)
        """Take the tokens after a block."""
        self.keep("after", output)

    def enter_attention(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute what fused kernels do not keep, from the tokens that the attention reads."""
        if replaying():
            return
        arguments = bind(attention, args, kwargs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            if self.wants("queries", "keys", "values"):
                projected = self.anatomy.project(attention, next(iter(arguments.values())))
                for part in ("queries", "keys", "values"):
                    self.keep(part, getattr(projected, part).contiguous())  # not a view that keeps the other two alive
            if self.wants("attention"):
                self.keep("attention", self.anatomy.weights(attention, arguments))
        if self.stops:
            raise Enough

    def enter_linear(self, linear: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002 (torch's signature)
        """Take the hidden units that the last layer of an MLP reads."""
        self.keep("hidden", args[0])


@contextmanager
def capture(
    model: nn.Module | Backbone,
    layers: int | Sequence[int] | None = None,
    parts: str | Sequence[str] = "after",
    *,
    device: torch.device | str | None = None,
) -> Iterator[Captured]:
    """Record what happens inside a model while it runs in the `with` block; afterwards no hook is left.

        with capture(model, layers=[0, 5, -1], parts=("after", "attention")) as captured:
            model(images)
        captured.after[5]  # b n d
        captured.attention[-1]  # b h n n

    Any number of forward passes, as the user makes them (autocast, gradients, other captures around it); several are
    joined along the batch. All tokens are there, prefix tokens first. Values are detached, and those of gradient
    checkpointing count once. In training, blocks that drop images record those that their attention and MLP saw.

    Args:
        model: ours, any timm, transformers or open_clip model that `as_backbone` takes, or what it returned.
        layers: one or more blocks from 0, negative ones from the end; all by default.
        parts: one or more of before, after (tokens around a block), queries, keys, values, attention, hidden.
        device: where to keep the values, such as "cpu"; by default they stay where they are computed.

    Raises:
        InputError: a layer, part or model that is not there; a compiled model, or packed batches.
    """
    anatomy = find_anatomy(model)
    wanted = [parts] if isinstance(parts, str) else parts
    for part in wanted:
        if part not in PARTS:
            raise InputError(f"unknown part {part!r}{nearest(part, PARTS)}; parts are {', '.join(PARTS)}")
    depth = len(anatomy.blocks)
    chosen = range(depth) if layers is None else [layers] if isinstance(layers, int) else layers
    with record(anatomy, [block_index(layer, depth) for layer in chosen], wanted, device, detached=True) as captured:
        yield captured


@contextmanager
def record(
    anatomy: Anatomy,
    layers: Sequence[int],
    parts: Sequence[str],
    device: torch.device | str | None = None,
    *,
    detached: bool,
    stop: bool = False,
) -> Iterator[Captured]:
    """Hooks around forward passes; see `capture`. Values that are not detached carry gradients.

    With `stop`, a forward pass raises `Enough` at the attention of the last of the layers, which must be read there.
    """
    captured = Captured(layers, parts, len(anatomy.blocks))
    with ExitStack() as stack:
        for layer in set(layers):
            recorder = Recorder(anatomy, layer, captured, device, detached=detached)
            recorder.stops = stop and layer == max(layers)
            for handle in recorder.install():
                stack.callback(handle.remove)
        yield captured


def find_anatomy(model: nn.Module | Backbone) -> Anatomy:
    """Where a model keeps its parts.

    Raises:
        InputError: a compiled model, or one whose parts are not known.
    """
    from vitreg_core.backbones import as_backbone  # it imports this module

    if not isinstance(model, nn.Module):
        raise InputError(
            f"{type(model).__name__} is no torch module, so nothing inside it can be captured; give a model"
        )
    known = as_backbone(model)
    return Native(known) if isinstance(known, VisionTransformer) else known


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a model with compiled modules: they skip hooks, so nothing inside them can be seen."""
    for module in model.modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise InputError(
                f"this {type(module).__name__} is compiled, and compiled models skip the hooks that look inside; "
                "give the original model, before torch.compile"
            )


def refuse_packed(arguments: Arguments) -> None:
    """Refuse several batches in one sequence: their images have different numbers of tokens."""
    if arguments.get("groups"):
        raise InputError(f"capture of {len(arguments['groups'])} packed batches; call the model on each one by itself")


def replaying() -> bool:
    """Whether gradient checkpointing runs a forward pass a second time, inside the backward pass."""
    return torch._C._current_graph_task_id() != -1


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Arguments of a call by name."""
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments


def find(module: nn.Module, paths: str, what: str) -> nn.Module:
    """The first of some submodules, separated by bars, that a module has.

    Raises:
        InputError: it has none of them; names what cannot be read.
    """
    for path in paths.split("|"):
        try:
            return module.get_submodule(path)
        except AttributeError:
            continue
    names = " or ".join(paths.split("|"))
    raise InputError(f"{type(module).__name__} has no {names}, so its {what} cannot be read; ask for other parts")
