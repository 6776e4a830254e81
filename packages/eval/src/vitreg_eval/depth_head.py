"""The linear depth head of DINOv2: what it computes, its loss, its files, and those that were released for DINOv2."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from vitreg_core.config import Config
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone
from vitreg_core.weights.files import load_checked, read_tensors, weights_hash

from vitreg_eval.files import write_whole

BINS, MIN_DEPTH, MAX_DEPTH = 256, 1e-3, 10.0
OFFSET = 0.1
"""Added to every weight after the ReLU."""
AT_ONCE = 4
"""Images whose weights are held at a time: the memory of more is given back and asked for again at every step."""
UPSAMPLE = 4
"""How many times finer than the patches a head answers, along each side."""
FILE = "head.safetensors"
RELEASED = ("decode_head.conv_depth.weight", "decode_head.conv_depth.bias")
LARGE = {24: (4, 11, 17, 23)}
"""Depths whose four blocks are not evenly spread: those of ViT-L begin one late in DINOv2, and its heads expect it."""


class DepthHead(nn.Module):
    """Linear layer to weights over depths, whose mean is the depth in metres (DINOv2, linear head; no batch norm).

    The definition enlarges the features four times before the layer. Here the layer comes first, since it acts on each
    place alone and bilinear weights sum to one: the same numbers up to rounding, for a sixteenth of the work.
    """

    bins: Float[Tensor, " bins"]

    def __init__(
        self, channels: int, *, bins: int = BINS, min_depth: float = MIN_DEPTH, max_depth: float = MAX_DEPTH
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, bins, kernel_size=1)
        nn.init.normal_(self.conv.weight, std=0.01)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)
        self.register_buffer("bins", torch.linspace(min_depth, max_depth, bins), persistent=False)

    def forward(self, features: Float[Tensor, "b channels rows cols"]) -> Float[Tensor, "b height width"]:
        """Depth in metres, four times finer than the features."""
        return torch.cat([self.mean_depth(part) for part in features.split(AT_ONCE)])

    def mean_depth(self, features: Float[Tensor, "b channels rows cols"]) -> Float[Tensor, "b height width"]:
        """Depth of a few images."""
        scores = self.conv(features).contiguous(memory_format=torch.channels_last)  # enlarged four times as fast so
        finer = F.interpolate(scores, scale_factor=UPSAMPLE, mode="bilinear", align_corners=False).relu_()
        sums = torch.stack([self.bins, torch.ones_like(self.bins)], dim=1)
        total, weight = (finer.movedim(1, -1) @ sums + OFFSET * sums.sum(dim=0)).unbind(dim=-1)
        return total / weight


def resize_depth(depth: Float[Tensor, "b rows cols"], size: tuple[int, int]) -> Float[Tensor, "b height width"]:
    """Depth at another size, bilinear."""
    return F.interpolate(depth[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def sig_loss(
    predicted: Float[Tensor, "b height width"],
    depth: Float[Tensor, "b height width"],
    max_depth: float = MAX_DEPTH,
    *,
    warm_up: bool = False,
) -> Float[Tensor, ""]:
    """Scale-tolerant loss of log depths (Eigen et al. 2014, as in DINOv2): sqrt(var + 0.15 mean^2).

    Args:
        predicted: metres.
        depth: metres; pixels without a reading (0) or beyond `max_depth` do not count.
        max_depth: metres.
        warm_up: leave the variance out, as DINOv2 does in the first 100 steps.

    Returns:
        0 where fewer than two pixels count.
    """
    valid = (depth > 0) & (depth <= max_depth)
    if valid.sum() < 2:
        return 0 * predicted.sum()
    difference = torch.log(predicted[valid] + 1e-3) - torch.log(depth[valid] + 1e-3)
    if warm_up:
        return math.sqrt(0.15) * difference.mean().abs()
    return torch.sqrt(difference.var() + 0.15 * difference.mean().square())


# Which features a head reads


def head_layers(count: int, depth: int) -> tuple[int, ...]:
    """Blocks, from 0, whose output a head reads: the last, or four as DINOv2 chose them.

    Args:
        count: 1 or 4 (lin. 1 and lin. 4).
        depth: blocks of the model.

    Raises:
        InputError: a model of fewer blocks.
    """
    if depth < count:
        raise InputError(f"--layers {count} of a model with {depth} blocks; give --layers 1")
    if count == 4 and depth in LARGE:
        return LARGE[depth]
    return tuple((index + 1) * depth // count - 1 for index in range(count))


def join_maps(
    patches: Float[Tensor, "b layers d rows cols"], cls: Float[Tensor, "b layers d"]
) -> Float[Tensor, "b channels rows cols"]:
    """What a head reads: of every block the patch map and, beside every patch, the class token."""
    beside = cls[..., None, None].expand_as(patches)
    return torch.cat([patches, beside], dim=2).flatten(1, 2)


# Files


class HeadRecord(Config):
    """What a head file is good for, as it stands in the .json beside it."""

    layers: tuple[int, ...]
    """Blocks, from 0, whose output it reads."""
    norm: bool = False
    """Whether that output went through the final norm."""
    channels: PositiveInt
    """Inputs of the linear layer: twice the width of the model for each block."""
    bins: int = Field(default=BINS, ge=2)
    """Depths it weighs."""
    min_depth: PositiveFloat = MIN_DEPTH
    """Smallest of them in metres."""
    max_depth: PositiveFloat = MAX_DEPTH
    """Largest of them in metres."""
    model_hash: str | None = None
    """Hash of the model that it was trained on; none in a released file."""
    released: bool = False
    """Whether it comes from DINOv2, whose heads stretch the padded image over the unpadded one."""


@dataclass(frozen=True)
class TrainedHead:
    """A head and what it is good for."""

    head: DepthHead
    record: HeadRecord


def build_head(record: HeadRecord) -> DepthHead:
    """A head of the shape that a record names."""
    return DepthHead(record.channels, bins=record.bins, min_depth=record.min_depth, max_depth=record.max_depth)


def model_hash(backbone: Backbone) -> str | None:
    """Hash of a model's weights; None for what has no parameters of its own."""
    return weights_hash(backbone) if isinstance(backbone, nn.Module) else None


def save_head(trained: TrainedHead, folder: Path) -> Path:
    """Write `head.safetensors` and `head.json`; each appears whole or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    path = folder / FILE
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.head.state_dict().items()}
    write_whole(path.with_suffix(".json"), (trained.record.model_dump_json(indent=2) + "\n").encode())
    write_whole(path, save(tensors))
    return path


def load_head(path: Path, backbone: Backbone, max_depth: float) -> TrainedHead:
    """A head that was saved here, or a released linear depth head of DINOv2.

    Args:
        path: `head.safetensors`, the folder that holds it, or a released `..._linear_head.pth` or
            `..._linear4_head.pth`.
        backbone: what is to give its features.
        max_depth: range in metres of a released head, whose file does not name it; others carry theirs.

    Raises:
        InputError: the file is missing, damaged, no depth head, or belongs to another model.
    """
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; give --head a head.safetensors, or a released linear depth head (.pth)"
        )
    tensors = read_tensors(path)
    if RELEASED[0] in tensors:
        return released_head(path, tensors, backbone, max_depth)
    record = read_record(path.with_suffix(".json"))
    if record.model_hash != model_hash(backbone):
        raise InputError(f"{path}: was trained on the features of another model; give the --model it belongs to")
    check_record(record, path, backbone)
    head = build_head(record)
    load_checked(head, tensors, path)
    return TrainedHead(head.eval(), record)


def check_record(record: HeadRecord, path: Path, backbone: Backbone) -> None:
    """Refuse a record that does not fit its model."""
    for layer in record.layers:
        if not -backbone.depth <= layer < backbone.depth:
            raise InputError(
                f"{path}: reads block {layer} of a model with {backbone.depth} blocks; write the head again"
            )
    if record.channels != 2 * len(record.layers) * backbone.embed_dim:
        raise InputError(
            f"{path}: {record.channels} features of {len(record.layers)} blocks do not fit a model of width "
            f"{backbone.embed_dim}; write the head again"
        )


def released_head(path: Path, tensors: dict[str, Tensor], backbone: Backbone, max_depth: float) -> TrainedHead:
    """A linear depth head as DINOv2 releases it; a file may hold its backbone too, which is left out."""
    weight = tensors[RELEASED[0]]
    count, rest = divmod(weight.shape[1] if weight.ndim == 4 else 0, 2 * backbone.embed_dim)
    if rest or count not in {1, 4} or len(weight) < 2:
        raise InputError(
            f"{path}: a depth head with weights of {tuple(weight.shape)} does not fit a model of width "
            f"{backbone.embed_dim}; they are (depths, 2 or 8 times the width, 1, 1)"
        )
    record = HeadRecord(
        layers=head_layers(count, backbone.depth),
        channels=weight.shape[1],
        bins=len(weight),
        max_depth=max_depth,
        released=True,
    )
    head = build_head(record)
    ours = {f"conv.{name.rpartition('.')[2]}": tensors[name] for name in RELEASED if name in tensors}
    load_checked(head, ours, path)
    return TrainedHead(head.eval(), record)


def read_record(path: Path) -> HeadRecord:
    """The record beside a head.

    Raises:
        InputError: it is missing, damaged, or names what no head has.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; a head needs the .json that was written beside it")
    try:
        record = HeadRecord.model_validate(json.loads(path.read_text()))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; write the head again") from None
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); write the head again") from None
    if not math.isfinite(record.max_depth) or record.min_depth >= record.max_depth or record.bins > 2**16:
        raise InputError(f"{path}: depths from {record.min_depth} to {record.max_depth} m; write the head again")
    return record
