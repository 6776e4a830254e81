"""What registers hold, by experiment: put something else in their place while a model runs.

Their exact content matters little if a model works as well with the mean register (Sun et al. 2024, arXiv 2402.17762)
or with noise and the registers of other images, but not with zeros (arXiv 2604.14433).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from vitreg_core.backbones import as_backbone
from vitreg_core.capturing import Anatomy, bind, capture, find_anatomy, refuse_packed
from vitreg_core.config import nearest
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone, block_index

Kind = Literal["zero", "mean", "shuffled", "noise"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Replace = Callable[[Float[Tensor, "b r d"]], Float[Tensor, "b r d"]]
"""Registers of a batch after a block, to what stands in their place."""


@dataclass(frozen=True)
class RegisterStatistics:
    """Registers after each block, over the images of a calibration set."""

    mean: Float64[Tensor, "depth r d"]
    std: Float64[Tensor, "depth r d"]
    """Over images, of each entry by itself."""
    images: int


@torch.no_grad()
def register_statistics(model: nn.Module | Backbone, batches: Iterable[Float[Tensor, "_ 3 _ _"]]) -> RegisterStatistics:
    """Mean and standard deviation of every register after every block, in one pass over the images.

    Args:
        model: ours, or a foreign one that `as_backbone` takes.
        batches: normalised pixels; sizes may differ.

    Raises:
        InputError: a model without registers, or no images.
    """
    backbone, where = find_registers(model)
    mean = scatter = torch.zeros(1, dtype=torch.float64)
    count = 0
    for images in batches:
        with capture(backbone, None, "after") as captured:
            backbone.features(images.to(backbone.device))
        blocks = [captured.after[layer][:, where].double().cpu() for layer in range(backbone.depth)]
        registers = torch.stack(blocks, dim=1)  # b depth r d
        apart, count = registers.mean(dim=0) - mean, count + len(registers)
        share = len(registers) / count
        scatter = scatter + (registers - registers.mean(dim=0)).square().sum(dim=0)
        scatter = scatter + apart.square() * (len(registers) * (1 - share))
        mean = mean + apart * share
    if not count:
        raise InputError("0 images to take the mean register of; give some")
    return RegisterStatistics(mean, (scatter / count).sqrt(), count)


@contextmanager
def replace_registers(
    model: nn.Module | Backbone,
    kind: str,
    *,
    statistics: RegisterStatistics | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Iterator[None]:
    """Put something else in the place of the registers after each block, while a model runs in the `with` block.

        statistics = register_statistics(model, batches)
        with replace_registers(model, "mean", statistics=statistics):
            features = model(images)

    Afterwards no hook is left. The class token and the patches are not touched themselves.

    Args:
        model: ours, or a foreign one that `as_backbone` takes; in evaluation mode.
        kind: `zero`; `mean`, that of each register after each block over a calibration set; `shuffled`, the registers
            of another image of the batch, drawn anew for every block so that no image keeps its own; `noise`, normal,
            with the mean and standard deviation of every entry over the calibration set.
        statistics: of the same model; for mean and noise.
        layers: blocks after which the registers are replaced, from 0, negative ones from the end; all by default. After
            the last block alone nothing else can change.
        seed: of shuffled and noise.

    Raises:
        InputError: a model without registers, a block or kind that is not there, no statistics where they are needed,
            or, on running, a batch of one image for shuffled.
    """
    backbone, where = find_registers(model)
    if kind not in KINDS:
        raise InputError(f"unknown replacement {kind!r}{nearest(kind, KINDS)}; use one of {', '.join(KINDS)}")
    if statistics is None and kind in ("mean", "noise"):
        raise InputError(f"replacement {kind} without statistics; give register_statistics(model, batches)")
    anatomy: Anatomy = find_anatomy(backbone)
    chosen = range(backbone.depth) if layers is None else [block_index(layer, backbone.depth) for layer in layers]
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        for layer in sorted(set(chosen)):
            hook = swap(where, replacement(kind, statistics, layer, generator))
            stack.callback(anatomy.blocks[layer].register_forward_hook(hook, with_kwargs=True).remove)
        yield


def find_registers(model: nn.Module | Backbone) -> tuple[Any, slice]:
    """A model as a backbone, and where in its sequence the registers stand.

    Raises:
        InputError: it has none.
    """
    backbone = as_backbone(model) if isinstance(model, nn.Module) else model
    first = backbone.prefix.count("cls")
    if backbone.num_registers == 0:
        name = getattr(backbone, "source", "") or type(model).__name__
        raise InputError(f"{name} has no registers to replace; give a model with registers")
    return backbone, slice(first, first + backbone.num_registers)


def swap(where: slice, replace: Replace) -> Callable[..., Tensor]:
    """A forward hook that replaces the registers in what a block gives."""

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor) -> Tensor:
        refuse_packed(bind(block, args, kwargs))
        registers = replace(tokens[:, where]).to(tokens)
        return torch.cat([tokens[:, : where.start], registers, tokens[:, where.stop :]], dim=1)

    return hook


def replacement(kind: str, statistics: RegisterStatistics | None, layer: int, generator: torch.Generator) -> Replace:
    """What to put in the place of the registers after one block."""
    if kind == "zero":
        return torch.zeros_like
    if kind == "shuffled":
        return lambda registers: registers[derangement(len(registers), generator).to(registers.device)]
    assert statistics is not None  # checked on entering
    mean, std = statistics.mean[layer].float(), statistics.std[layer].float()
    if kind == "mean":
        return lambda registers: mean.expand(registers.shape)
    return lambda registers: mean + std * torch.randn(registers.shape, generator=generator)


def derangement(count: int, generator: torch.Generator) -> Int[Tensor, " b"]:
    """For each of several images another one, drawn at random: a single cycle through all of them.

    Raises:
        InputError: a single image.
    """
    if count < 2:
        raise InputError(f"shuffled registers of a batch of {count} image; give two or more at a time")
    order = torch.randperm(count, generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other
