"""How several processes share a model: a copy each (DDP), or every block split over all (FSDP2)."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from vitreg_core.errors import InputError


def distribute(
    network: nn.Module, blocks: nn.ModuleList, accelerator: Accelerator, strategy: Literal["ddp", "fsdp2"]
) -> nn.Module:
    """Put one network on its device, in its precision, and share it. Every process must hold the same weights.

    Under `fsdp2` each of the blocks is split, and the rest of the network as one more piece. Accelerate's own plugin
    for that is not used: it does nothing on CPUs.
    """
    if strategy == "ddp":
        return accelerator.prepare(network)
    prepared = accelerator.prepare_model(network, evaluation_mode=True)  # device and autocast, without DDP
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(prepared, mesh=mesh)


def refuse_lone_process(accelerator: Accelerator) -> None:
    """Refuse to split a model over one process.

    Raises:
        InputError: says how to start several.
    """
    if accelerator.num_processes == 1:
        raise InputError(
            "strategy=fsdp2 with 1 process: there is nothing to split the model over; use strategy=ddp, or start "
            "several with accelerate launch --num_processes N"
        )


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(value: Any, *, keep: bool) -> Any:  # noqa: ANN401 (nested values of any kind)
    """Join the split tensors in nested values, one at a time. Every process must call it.

    Args:
        value: tensors, numbers, strings, and dicts, lists and tuples of them.
        keep: whether this process wants them, on the CPU; it gets None in their place otherwise.
    """
    if isinstance(value, DTensor):
        joined = value.full_tensor()
        return joined.cpu() if keep else None
    if isinstance(value, Mapping):
        return {name: whole(part, keep=keep) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(part, keep=keep) for part in value)
    return value


def split_like(value: Tensor, target: Tensor) -> Tensor:
    """Split a whole tensor as another one is; as it is where the other is whole."""
    if not isinstance(target, DTensor):
        return value
    value = value.to(target.device, target.dtype)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into tensors of the same names, split or not."""
    for name, target in targets.items():
        target.copy_(split_like(values[name], target))


def fill_optimizer(optimizer: Optimizer, values: dict[str, Any]) -> None:
    """Take back the state of an optimizer from whole tensors, which are split as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: split_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in entry.items()
        }
        for index, entry in values["state"].items()
    }
    optimizer.load_state_dict({**values, "state": state})
