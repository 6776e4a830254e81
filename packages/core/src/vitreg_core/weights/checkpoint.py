"""What every family's reader works with: a checkpoint as found, and its tensors under our names."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitreg_core.config import PreprocessConfig, ViTConfig, validate
from vitreg_core.errors import InputError
from vitreg_core.weights.files import Tensors, shape

PLAIN_STEM = {"cls_token": "cls", "pos_embed": "positions", "patch_embed.proj": "patch_embed.proj", "norm": "norm"}
PLAIN_BLOCKS = {name: name for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
"""Names that most families share."""

HEADS = {
    64: 2, 96: 3, 192: 3, 256: 4, 320: 5, 384: 6, 512: 8, 640: 10, 768: 12, 832: 13, 896: 14,
    1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16,
}  # fmt: skip
"""Heads cannot be read off the tensors; these are those of the published ViTs of a width, but for DINOv3's."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a file under its own names, the config files beside it, and what the caller said."""

    file: Path
    tensors: Tensors
    config: Mapping[str, Any] = field(default_factory=dict)
    """`config.json`, as we, timm or transformers write it."""
    processor: Mapping[str, Any] = field(default_factory=dict)
    """`preprocessor_config.json` of transformers."""
    open_clip: Mapping[str, Any] = field(default_factory=dict)
    """`open_clip_config.json`."""
    given: Mapping[str, object] = field(default_factory=dict)
    """Fields of the model's config that the caller fixes."""

    def section(self, values: Mapping[str, Any], name: str, where: str = "config.json") -> dict[str, Any]:
        """A part of a config file; empty where there is none.

        Raises:
            InputError: it is no object.
        """
        part: object = values.get(name, {})
        if not isinstance(part, dict):
            raise InputError(f"{self.file.parent / where}: {name}={part!r} is not an object; mend or remove it")
        return part


@dataclass(frozen=True)
class Names:
    """How a family names its tensors; a table's entries are tensors, or modules with a weight and a bias."""

    stem: Mapping[str, str]
    """Outside the blocks: their name and ours."""
    blocks: Mapping[str, str]
    """Inside a block."""
    block: str = r"blocks\.(\d{1,4})\."
    """What stands before the names inside a block; group 1 is the block's number."""
    prefix: str = ""
    """What may stand before every name."""
    dropped: str = r"(?!)"
    """Tensors that are left out: they take no part in what the model computes."""

    def translate(self, name: str) -> str | None:
        """Our name of a tensor; empty for one that is left out, None for one that nobody knows."""
        if re.match(self.dropped, name):
            return ""
        bare = re.sub(f"^(?:{self.prefix})", "", name)
        block = re.match(self.block, bare)
        if block is None:
            return look_up(bare, self.stem)
        ours = look_up(bare[block.end() :], self.blocks)
        return ours and f"blocks.{int(block[1])}.{ours}"


def look_up(name: str, table: Mapping[str, str]) -> str | None:
    """Our name of a tensor or of a parameter of a module in the table."""
    module, _, parameter = name.rpartition(".")
    if name in table:
        return table[name]
    return f"{table[module]}.{parameter}" if module in table and parameter in ("weight", "bias") else None


class Parts:
    """Tensors under our names, and the name that each has in the file."""

    def __init__(self, checkpoint: Checkpoint, names: Names) -> None:
        """Rename the tensors of a checkpoint.

        Raises:
            InputError: a tensor that the family does not have.
        """
        self.file = checkpoint.file
        self.tensors: Tensors = {}
        self.origins: dict[str, str] = {}
        for name, tensor in checkpoint.tensors.items():
            ours = names.translate(name)
            if ours is None or ours in self.tensors:
                raise InputError(f"{self.file}: unexpected tensor {name} of shape {shape(tensor)}; nothing was loaded")
            if ours:
                self.tensors[ours], self.origins[ours] = tensor, name
        for token, dims in (("cls", 1), ("registers.tokens", 2), ("mask_token", 1)):
            self.flatten(token, dims)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """Shape of a tensor that every model of the family has.

        Raises:
            InputError: it is missing, or has another number of dimensions.
        """
        if name not in self.tensors:
            raise InputError(f"{self.file}: tensor {name} is missing; nothing was loaded")
        found = shape(self.tensors[name])
        if len(found) != dims or 0 in found:
            raise self.misshapen(name)
        return found

    def misshapen(self, name: str) -> InputError:
        """The error for a tensor of a shape that cannot be."""
        found = shape(self.tensors[name])
        return InputError(
            f"{self.file}: tensor {self.origins[name]} has shape {found}, which no model of its family has; "
            "nothing was loaded"
        )

    def flatten(self, name: str, dims: int) -> None:
        """Drop leading dimensions of 1 until so many are left, where the tensor is there.

        Raises:
            InputError: there are fewer dimensions, or others lead.
        """
        if name in self.tensors:
            found = shape(self.tensors[name])
            if len(found) < dims or any(side != 1 for side in found[: len(found) - dims]):
                raise self.misshapen(name)
            if 0 in found and name != "registers.tokens":
                raise self.misshapen(name)
            self.tensors[name] = self.tensors[name].reshape(found[len(found) - dims :])

    def join(self, names: Sequence[str], joined: str) -> None:
        """Stack the rows of tensors of one shape, in place of them.

        Raises:
            InputError: one is missing or has another shape than the first.
        """
        for name in names:
            if name not in self.tensors:
                raise InputError(f"{self.file}: tensor {name} is missing; nothing was loaded")
            if self.tensors[name].shape != self.tensors[names[0]].shape:
                wanted = shape(self.tensors[names[0]])
                raise InputError(
                    f"{self.file}: tensor {self.origins[name]} has shape {shape(self.tensors[name])}, not {wanted}; "
                    "nothing was loaded"
                )
        self.origins[joined] = self.origins[names[0]]
        self.tensors[joined] = torch.cat([self.tensors.pop(name) for name in names])

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len({match[1] for name in self.tensors if (match := re.match(r"blocks\.(\d+)\.", name))})


@dataclass(frozen=True)
class Weights:
    """A model as its checkpoint describes it, not built yet."""

    config: ViTConfig
    preprocess: PreprocessConfig
    tensors: Tensors
    """Under our names."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """The name of each in the file."""


def describe(checkpoint: Checkpoint, parts: Parts, facts: Mapping[str, object]) -> ViTConfig:
    """Read the shapes of a model off its tensors, whose leading dimensions are gone and whose qkv is packed.

    Args:
        checkpoint: where the tensors are from; what its caller gives counts more than the facts.
        parts: the tensors.
        facts: what the family says beyond the tensors.

    Raises:
        InputError: a tensor that every ViT has is missing or misshapen, or the number of heads is not known.
    """
    embed_dim, channels, height, width = parts.shape("patch_embed.proj.weight", 4)
    if channels != 3 or height != width:
        raise parts.misshapen("patch_embed.proj.weight")
    values = {
        "patch_size": width,
        "embed_dim": embed_dim,
        "depth": parts.depth,
        **feed_forward(parts, embed_dim),
        "class_token": "cls" in parts,
        "registers": len(parts.tensors["registers.tokens"]) if "registers.tokens" in parts else 0,
        "mask_token": "mask_token" in parts,
        "class_position": "positions.cls" in parts,
        "position": "learned" if "positions.patches" in parts else "rope",
        "pre_norm": "pre_norm.weight" in parts,
        "patch_bias": "patch_embed.proj.bias" in parts,
        "qkv_bias": "blocks.0.attn.qkv.bias" in parts,
        "qk_norm": "blocks.0.attn.q_norm.weight" in parts,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in parts else None,
        "num_classes": parts.shape("head.weight", 2)[0] if "head.weight" in parts else 0,
        "head_bias": "head.bias" in parts or "head.weight" not in parts,
        "norm_pooled": "fc_norm.weight" in parts,
        **facts,
        **checkpoint.given,
    }
    if values.get("num_heads") is None:
        values["num_heads"] = usual_heads(checkpoint, embed_dim)
    if "registers.tokens" not in parts:
        parts.tensors["registers.tokens"] = torch.empty(0, embed_dim)
    return validate(ViTConfig, values, str(checkpoint.file))


def feed_forward(parts: Parts, embed_dim: int) -> dict[str, object]:
    """Kind and width of the feed-forward networks."""
    if "blocks.0.mlp.w12.weight" not in parts:
        return {"mlp_ratio": parts.shape("blocks.0.mlp.fc1.weight", 2)[0] / embed_dim}
    hidden = parts.shape("blocks.0.mlp.w3.weight", 2)[1]
    # the ratio whose two thirds, rounded up, are these hidden units
    return {
        "feed_forward": "swiglu",
        "mlp_ratio": math.ceil(1.5 * hidden) / embed_dim,
        "swiglu_align": 1 if hidden % 8 else 8,
    }


def usual_heads(checkpoint: Checkpoint, embed_dim: int) -> int:
    """Heads that `config.json` says, or those of the published ViTs of this width.

    Raises:
        InputError: there are neither.
    """
    stated = checkpoint.section(checkpoint.config, "model_args").get("num_heads")
    if stated is None and embed_dim not in HEADS:
        raise InputError(
            f"{checkpoint.file}: the heads of a ViT of width {embed_dim} are not known; give num_heads=N, or write "
            '"model_args": {"num_heads": N} into the config.json beside it'
        )
    return HEADS[embed_dim] if stated is None else stated


def place(parts: Parts, prefixes: Sequence[int], size: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:
    """Split the table of positions into those of prefix tokens, which come back, and of patches.

    Args:
        parts: get `positions.patches` in place of `positions`.
        prefixes: numbers of rows before the patches' that the family knows.
        size: height and width in pixels that the config files say.

    Returns:
        The rows of the prefix tokens, and the image size that the patches' rows fit.

    Raises:
        InputError: no such number of rows leaves a square grid or that of the size, or several do.
    """
    parts.flatten("positions", 2)
    count, _ = parts.shape("positions", 2)
    patch = parts.shape("patch_embed.proj.weight", 4)[-1]
    stated = None if size is None else (size[0] // patch, size[1] // patch)
    fits = [prefix for prefix in prefixes if stated and stated[0] * stated[1] == count - prefix]
    squares = [prefix for prefix in prefixes if count > prefix and math.isqrt(count - prefix) ** 2 == count - prefix]
    if len(fits or squares) != 1:
        raise InputError(
            f"{parts.file}: {parts.origins['positions']} of {count} rows is no square grid with or without rows for "
            "prefix tokens, or may be several; write the image size it fits into the config file beside it"
        )
    prefix = (fits or squares)[0]
    table, parts.origins["positions.patches"] = parts.tensors.pop("positions"), parts.origins.pop("positions")
    parts.tensors["positions.patches"] = table[prefix:]
    side = math.isqrt(count - prefix) * patch
    return table[:prefix], size if fits and size else (side, side)


def place_with_class(parts: Parts, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Split the table of positions into that of the class token and those of the patches; returns the image size."""
    rows, size = place(parts, [1], size)
    parts.tensors["positions.cls"], parts.origins["positions.cls"] = rows[0], parts.origins["positions.patches"]
    return size


def two_sides(checkpoint: Checkpoint, config: str, name: str, value: object) -> tuple[int, int]:
    """Height and width in pixels that an entry of a config file says, as one number or two.

    Raises:
        InputError: it is no size.
    """
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    numbers = [side for side in sides if isinstance(side, int) and side > 0]
    if len(sides) != 2 or len(numbers) != 2:
        raise InputError(f"{checkpoint.file.parent / config}: {name}={value!r} is not a size in pixels; mend it")
    return numbers[0], numbers[1]


def square(size: tuple[int, int]) -> int | tuple[int, int]:
    """An image size as configs hold it: one number for a square."""
    return size[0] if size[0] == size[1] else size


STANDARD = PreprocessConfig(image_size=224, crop_ratio=0.875)
"""Evaluation of DINO, DINOv2, DINOv3 and MAE: bicubic resize of the shorter side to 256, centre crop of 224."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""How OpenAI's CLIP, and open_clip after it, normalise pixels."""
