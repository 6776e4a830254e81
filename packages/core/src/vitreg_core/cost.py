"""What a model costs: parameters, FLOPs and memory, counted without allocating it."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vitreg_core.config import ViTConfig, override
from vitreg_core.presets import preset_config
from vitreg_core.vit import VisionTransformer


class ModelCost(NamedTuple):
    """What a model takes for one image, in float32. The head counts as parameters only."""

    parameters: int
    """Numbers that it learns."""
    flops: int
    """Floating-point operations of a forward pass, a multiply-add being 2: the patch embedding, all linear layers and
    the two products of attention. Norms, activations, softmax and the resize of positions are left out."""
    training_bytes: int
    """Memory that the forward pass leaves for the backward pass, the image included and the parameters not: every
    tensor that autograd saves, once, with a fused attention kernel, without drop path and gradient checkpointing."""
    inference_bytes: int
    """Most memory that the forward pass holds at once without gradients, beside parameters and image."""


class RegisterOverhead(NamedTuple):
    """Relative increase over the same model without registers; 0.01 is one per cent."""

    parameters: Float[Tensor, " counts"]
    flops: Float[Tensor, " counts"]


def model_cost(config: str | ViTConfig, image_size: int | tuple[int, int] | None = None) -> ModelCost:
    """Count what a model takes for one image; nothing of its size is allocated.

    Args:
        config: shapes, or the name of a preset.
        image_size: side in pixels, or height and width; the native one of the config by default.

    Raises:
        InputError: unknown preset, or images smaller than one patch.
    """
    config = preset_config(config) if isinstance(config, str) else config
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size or config.size
    model = on_meta(config)
    flops = count_flops(model, height, width)
    with FakeTensorMode(allow_non_fake_inputs=True):  # as on the CPU, whose attention is fused; that of meta is not
        model, image = model.to_empty(device="cpu"), torch.empty(1, 3, height, width)
        return ModelCost(parameters(model), flops, saved_bytes(model, image), peak_bytes(model, image))


def register_overhead(config: str | ViTConfig, counts: Sequence[int] = range(17)) -> RegisterOverhead:
    """How much registers add to parameters and FLOPs at the native image size (registers paper, appendix B, Fig. 12).

    Args:
        config: shapes, or the name of a preset; its own number of registers does not matter.
        counts: numbers of registers.

    Raises:
        InputError: unknown preset, or a negative count.
    """
    config = preset_config(config) if isinstance(config, str) else config
    models = [on_meta(override(config, {"registers": count})) for count in (0, *counts)]
    return RegisterOverhead(
        growth([parameters(model) for model in models]),
        growth([count_flops(model, *config.size) for model in models]),
    )


def growth(values: Sequence[int]) -> Float[Tensor, " counts"]:
    """Relative increase of all values over the first one."""
    first, *others = values
    return torch.tensor(others, dtype=torch.float64) / first - 1


def on_meta(config: ViTConfig) -> VisionTransformer:
    """The model without storage."""
    with torch.device("meta"):
        return VisionTransformer(override(config, {"drop_path": 0.0}))


def parameters(model: VisionTransformer) -> int:
    """Numbers that a model learns."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_flops(model: VisionTransformer, height: int, width: int) -> int:
    """Operations of a forward pass for one image; on the meta device, as torch 2.10 misses attention on the CPU."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops()


def saved_bytes(model: VisionTransformer, image: Float[Tensor, "1 3 height width"]) -> int:
    """Memory of what autograd saves in a forward pass, but parameters; views of one memory count once."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(image)
    learned = {id(parameter.untyped_storage()) for parameter in model.parameters()}
    storages = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in saved}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in learned)


@torch.no_grad()
def peak_bytes(model: VisionTransformer, image: Float[Tensor, "1 3 height width"]) -> int:
    """Most memory that a forward pass holds at once."""
    with LiveMemory() as memory:
        model(image)
    return memory.peak


class LiveMemory(TorchDispatchMode):
    """Follows what operations allocate until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        operation: Callable[..., object],
        types: Sequence[type],
        args: tuple = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run an operation and add the memory that is new in its results."""
        result = operation(*args, **(kwargs or {}))
        known = self.live.keys() | storages((args, kwargs)).keys()
        for key, storage in storages(result).items():
            if key not in known:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def storages(tree: object) -> dict[int, torch.UntypedStorage]:
    """Memory of all tensors in nested arguments or results."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}
