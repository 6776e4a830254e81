"""The linear segmentation head: training it, and keeping it in a file, ours or DINOv2's."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from pydantic import Field, PositiveInt, ValidationError
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from vitreg_core.config import Config
from vitreg_core.errors import InputError
from vitreg_core.weights.files import check_tensors, read_config, read_tensors

from vitreg_eval.datasets.examples import IGNORE
from vitreg_eval.dense import HeadSchedule
from vitreg_eval.files import write_whole

DROPOUT = 0.1
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-3
WARMUP = 1500 / 40_000
"""Share of the steps in which the learning rate rises."""
OFFICIAL = {"conv_seg": "conv", "bn": "norm"}
"""Names of the layers in the released heads, below `decode_head`, and here."""
FILE, RECORD = "head.safetensors", "head.json"


class SegmentHead(nn.Module):
    """Batch norm and one linear layer on every patch, the linear head of DINOv2.

    While it trains, whole channels are dropped first, as DINOv3 does in the protocol that continues DINOv2's.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(DROPOUT)
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, classes, kernel_size=1)
        nn.init.normal_(self.conv.weight, std=0.01)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, features: Float[Tensor, "b channels rows cols"]) -> Float[Tensor, "b classes rows cols"]:
        """Logits of every patch."""
        return self.conv(self.norm(self.dropout(features)))


class HeadRecord(Config):
    """What a head was trained for, beside its weights."""

    dataset: str
    """Name of the data set."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the outputs; empty where they have none."""
    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    """Blocks whose patch tokens it reads, side by side."""
    crop: PositiveInt | None = None
    """Side of the training crops in pixels; None for a head whose file does not say."""
    patch_size: PositiveInt
    """Of the model."""
    model: str | None = None
    """Hash of the weights of the model; None for a head whose file does not say."""


# Training


def segment_loss(
    logits: Float[Tensor, "b classes rows cols"],
    masks: UInt8[Tensor, "b height width"],
    step: int,  # noqa: ARG001 (the same at every step)
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the pixels that count, logits enlarged to the masks."""
    last = logits.contiguous(memory_format=torch.channels_last)  # half the time of the same on CPU
    enlarged = F.interpolate(last, size=tuple(masks.shape[-2:]), mode="bilinear")
    rows, labels = rearrange(enlarged, "b classes h w -> (b h w) classes"), masks.flatten().long()
    counted = (labels != IGNORE).sum().clamp(min=1)  # a batch without any gives 0, not 0 / 0
    return F.cross_entropy(rows, labels, ignore_index=IGNORE, reduction="sum") / counted


def segment_schedule(steps: int, save_every: int = 500) -> HeadSchedule:
    """AdamW with a linear warm-up and a cosine to 0 (DINOv3's protocol; its scheduler skips the first step)."""
    return HeadSchedule(
        steps, lambda step: segment_lr(max(step - 1, 0), steps), weight_decay=WEIGHT_DECAY, save_every=save_every
    )


def segment_lr(time: int, steps: int) -> float:
    """Learning rate after so many steps of the scheduler."""
    warmup = round(WARMUP * steps)
    if time < warmup:
        return LEARNING_RATE * (1 - (1 - time / warmup) * (1 - 1e-6)) * (1 - time / steps)
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (time + 1) / steps))


# Files


def save_head(head: SegmentHead, record: HeadRecord, folder: Path) -> None:
    """Write `head.safetensors` and `head.json`; each appears whole or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    write_whole(folder / RECORD, record.model_dump_json(indent=2).encode())
    write_whole(folder / FILE, save(tensors))


def load_head(source: Path, embed_dim: int, patch_size: int) -> tuple[SegmentHead, HeadRecord]:
    """Read a head that `save_head` wrote, or a released linear or `ms` head of DINOv2.

    Args:
        source: a folder with `head.safetensors`, such a file, or a released `.pth`.
        embed_dim: width of a token of the model; the released heads say by their width how many of the last blocks
            they read.
        patch_size: of the model.

    Returns:
        The head in evaluation mode, and what is known of it.

    Raises:
        InputError: no head, a damaged one, or one for a model of another width or patch size.
    """
    path = source / FILE if source.is_dir() else source
    if not path.is_file():
        raise InputError(f"{path}: no such file; give --head a folder with {FILE}, or a released .pth file")
    tensors = our_names(read_tensors(path))
    weight = tensors.get("conv.weight")
    if weight is None or weight.ndim != 4:
        raise InputError(f"{path}: no 1x1 convolution in it, such as conv.weight or decode_head.conv_seg.weight")
    classes, channels = weight.shape[:2]
    if channels % embed_dim:
        raise InputError(f"{path}: reads {channels} channels, tokens of this model have {embed_dim}; give its own head")
    head = SegmentHead(channels, classes)
    expected = {name: tensor for name, tensor in head.state_dict().items() if tensor.is_floating_point()}
    check_tensors(expected, {name: tensor for name, tensor in tensors.items() if name in expected}, path, {})
    check_names(tensors, expected, path)
    head.load_state_dict({**head.state_dict(), **{name: tensors[name].float() for name in expected}})
    record = read_record(path, channels // embed_dim, patch_size)
    check_record(record, path, classes, channels // embed_dim, patch_size)
    return head.eval(), record


def our_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of `SegmentHead`."""
    found = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.removeprefix("decode_head.").partition(".")
        found[f"{OFFICIAL.get(layer, layer)}.{rest}" if rest else layer] = tensor
    return found


def check_names(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that no linear head has, such as those of a deeper one."""
    for name in tensors.keys() - expected.keys() - {"norm.num_batches_tracked"}:
        raise InputError(f"{path}: unexpected tensor {name}; give a linear segmentation head")


def read_record(path: Path, count: int, patch_size: int) -> HeadRecord:
    """What stands beside a head, or what its shape says."""
    if path.name != FILE or not (path.parent / RECORD).is_file():
        layers = tuple(range(-count, 0))
        return HeadRecord(dataset=path.stem, classes=(), layers=layers, patch_size=patch_size)
    try:
        return HeadRecord.model_validate_json(json.dumps(read_config(path.parent / RECORD)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path.parent / RECORD}: {where}: {first['msg']}; write the head again") from None


def check_record(record: HeadRecord, path: Path, classes: int, count: int, patch_size: int) -> None:
    """Refuse a record that does not fit the weights or the model."""
    if len(record.layers) != count or len(record.classes) not in {0, classes}:
        raise InputError(
            f"{path.parent / RECORD}: {len(record.layers)} layers and {len(record.classes)} classes, the weights have "
            f"{count} and {classes}; write the head again"
        )
    if record.patch_size != patch_size:
        raise InputError(
            f"{path}: trained on patches of {record.patch_size} px, the model has {patch_size} px; give its own head"
        )


def check_model(record: HeadRecord, path: Path, model_hash: str) -> None:
    """Refuse a head that was trained on other weights."""
    if record.model is not None and record.model != model_hash:
        raise InputError(
            f"{path}: trained on the model {record.model[:12]}, this is {model_hash[:12]}; give the head of this model"
        )


def initial_head(channels: int, classes: int, seed: int) -> SegmentHead:
    """A new head, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SegmentHead(channels, classes)
