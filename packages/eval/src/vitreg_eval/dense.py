"""What the heads that answer for every pixel share: maps of frozen features, and the loop that trains a head."""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone
from vitreg_core.precision import Precision, use_precision

from vitreg_eval.files import write_whole
from vitreg_eval.prefetch import READERS, in_order
from vitreg_eval.processes import Processes, processes

T = TypeVar("T")
LONGEST = 20
"""Most that a picture's longer side may be over its shorter one where it is measured."""
STATE = "head_state.pt"
"""Name of the file that lets a killed training go on."""


@dataclass(frozen=True)
class HeadSchedule:
    """How a head is trained, by AdamW."""

    steps: int
    lr: Callable[[int], float]
    """Learning rate of a step, from 0."""
    weight_decay: float = 1e-3
    betas: Callable[[int], tuple[float, float]] = lambda step: (0.9, 0.999)  # noqa: ARG005 (the same at every step)
    """Decay rates of the two moments at a step."""
    grad_clip: float | None = None
    """Largest norm of the gradient; not clipped if None."""
    save_every: int = 500
    """Steps between two writes of the state."""


def this_process() -> Processes:
    """This process among those that share the training."""
    return processes(cpu=not torch.cuda.is_available())


# Maps of features


def pad_to_multiple(images: Float[Tensor, "b c height width"], patch_size: int) -> Float[Tensor, "b c rows cols"]:
    """Pad normalised images with zeros to whole patches, the same on both sides; an odd pixel goes right or below.

    What is made of a padded image is stretched to the size of the unpadded one, padding included, as the released
    heads of DINOv2 expect.
    """
    rows, cols = (-side % patch_size for side in images.shape[-2:])
    return F.pad(images, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2))


def check_aspect(picture: Image.Image, name: str) -> None:
    """Refuse a picture so long that its maps would fill the memory.

    Raises:
        InputError: it is over 20 times as long as wide, or the other way round.
    """
    if max(picture.size) > LONGEST * min(picture.size):
        raise InputError(
            f"{name}: {picture.width} x {picture.height} pixels, over {LONGEST} times as long as wide; leave it out"
        )


@torch.no_grad()
def feature_maps(
    backbone: Backbone, images: Float[Tensor, "b 3 height width"], layers: tuple[int, ...], precision: Precision
) -> Float[Tensor, "b channels rows cols"]:
    """Patch tokens after the final norm of several blocks, side by side in the order named, in float32."""
    images = pad_to_multiple(images.to(backbone.device), backbone.patch_size)
    with use_precision(precision, backbone.device):
        found = backbone.intermediate(images, layers)
    return torch.cat([features.patch_map.float() for features in found], dim=1)


# Batches


@dataclass(frozen=True)
class Draw:
    """One picture of a batch."""

    index: int
    """Of the picture in its set."""
    seed: int
    """Of all that is random about it in this batch."""


def draws(count: int, batch_size: int, seed: int, step: int) -> list[Draw]:
    """What this process takes of the batch of a step; a set is gone through in a new order each time.

    The batch depends on the seed and the step alone, however many processes share it.

    Raises:
        InputError: a batch that the processes cannot share evenly.
    """
    process = this_process()
    if batch_size % process.size:
        raise InputError(f"--batch_size {batch_size} over {process.size} processes; give a multiple of them")
    first = step * batch_size
    places = range(first + process.rank, first + batch_size, process.size)
    return [Draw(int(order(count, mix(seed, at // count))[at % count]), mix(seed, 1, at)) for at in places]


@lru_cache(maxsize=2)
def order(count: int, seed: int) -> Int[Tensor, " count"]:
    """A random order of the pictures of a set."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def mix(*numbers: int) -> int:
    """A seed below 2^63 made of several numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8]) >> 1


def prefetched(
    prepare: Callable[[Draw], T], count: int, batch_size: int, *, seed: int, steps: int
) -> Callable[[int], list[T]]:
    """Batches of pictures that threads prepare ahead; ask for one step after another, from any first one on.

    Args:
        prepare: what a draw gives; called from several threads.
        count: pictures in the set.
        batch_size: of all processes together.
        seed: of the batches.
        steps: of the whole training.
    """
    stream: Iterator[T] | None = None

    def batch(step: int) -> list[T]:
        nonlocal stream
        share = batch_size // this_process().size
        if stream is None:
            items = (draw for at in range(step, steps) for draw in draws(count, batch_size, seed, at))
            stream = in_order(prepare, items, threads=READERS, ahead=max(2 * share, READERS))
        return list(islice(stream, share))

    return batch


# Training


def train_head(  # the parts of a training, once each
    head: nn.Module,
    next_batch: Callable[[int], tuple[Tensor, Tensor]],
    loss: Callable[[Any, Tensor, int], Tensor],
    schedule: HeadSchedule,
    *,
    seed: int,
    out: Path | None = None,
    identity: str = "",
) -> None:
    """Train a head on frozen features; it is left in evaluation mode.

    Args:
        head: on the device of its inputs; initialised by the caller.
        next_batch: inputs and targets of a step, by `draws`.
        loss: of the head's output, the targets and the step.
        schedule: steps, learning rate and the rest.
        seed: of what is random in the head itself.
        out: folder that keeps the state, so that a killed training goes on with the same numbers; nothing is kept
            if None.
        identity: names all that decides the head (model, data, settings); a state of another identity is not used.

    Raises:
        InputError: the state cannot be read or written, or the head has diverged.
    """
    device = next(head.parameters()).device
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.0, weight_decay=schedule.weight_decay)
    start = load_state(head, optimizer, out, identity)
    main = this_process().rank == 0
    network = distribute(head)
    head.train()
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        tqdm(
            total=schedule.steps, initial=start, desc="head", unit="step", disable=None if main else True, leave=False
        ) as bar,
    ):
        for step in range(start, schedule.steps):
            torch.manual_seed(mix(seed, 2, step, this_process().rank))  # of dropout
            inputs, targets = next_batch(step)
            loss(network(inputs), targets, step).backward()
            update(head, optimizer, schedule, step)
            if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
                check_finite(head, step)
                if main:
                    save_state(head, optimizer, out, identity, step + 1)
            bar.update()
    copy_buffers(head)
    head.eval()


def update(head: nn.Module, optimizer: torch.optim.Optimizer, schedule: HeadSchedule, step: int) -> None:
    """One step of the optimizer."""
    if schedule.grad_clip is not None:
        nn.utils.clip_grad_norm_(head.parameters(), schedule.grad_clip)
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = schedule.lr(step), schedule.betas(step)
    optimizer.step()
    optimizer.zero_grad()


def distribute(head: nn.Module) -> nn.Module:
    """The head as several processes train it, with gradients averaged; the head itself for one process."""
    if this_process().size == 1:
        return head
    from accelerate import Accelerator

    device = next(head.parameters()).device.type
    joined = nn.SyncBatchNorm.convert_sync_batchnorm(head) if device == "cuda" else head
    return Accelerator(cpu=device == "cpu").prepare(joined)


def sum_of_processes(values: Float[Tensor, "*shape"], device: torch.device) -> Float[Tensor, "*shape"]:
    """Sum over the processes, on the CPU; they exchange it on their devices."""
    if this_process().size == 1:
        return values
    from accelerate.utils import reduce

    return reduce(values.to(device), "sum").cpu()


def copy_buffers(head: nn.Module) -> None:
    """Give all processes the running statistics of the first, which are those that are kept in files."""
    if this_process().size == 1:
        return
    from accelerate.utils import broadcast

    for buffer in head.buffers():
        buffer.copy_(broadcast(buffer.clone()))


def check_finite(head: nn.Module, step: int) -> None:
    """Refuse a head that has diverged."""
    if not all(tensor.isfinite().all() for tensor in head.parameters()):
        raise InputError(
            f"step {step}: the head has weights that are not finite; check the features, or run --precision fp32"
        )


def save_state(head: nn.Module, optimizer: torch.optim.Optimizer, out: Path | None, identity: str, steps: int) -> None:
    """Write all that the rest of a training depends on, whole or not at all."""
    if out is None:
        return
    buffer = io.BytesIO()
    values = {"identity": identity, "steps": steps, "head": head.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(values, buffer)
    write_whole(out / STATE, buffer.getvalue())


def load_state(head: nn.Module, optimizer: torch.optim.Optimizer, out: Path | None, identity: str) -> int:
    """Take up a training where its state was last written; of several processes the first reads it for all.

    Returns:
        Steps that are done; 0 without a state of this identity.
    """
    if out is None:
        return 0
    there = this_process().rank == 0 and (out / STATE).is_file()
    content = from_first((out / STATE).read_bytes() if there else b"")
    if not content:
        return 0
    try:
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if values["identity"] != identity:
            return 0
        head.load_state_dict(values["head"])
        optimizer.load_state_dict(values["optimizer"])
        return int(values["steps"])
    except Exception as error:  # a damaged file makes the reader fail in ways that nobody lists
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{out / STATE}: not a readable state of a head ({reason}); remove it") from None


def from_first(content: bytes) -> bytes:
    """What the first of several processes has."""
    if this_process().size == 1:
        return content
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([content])[0]
