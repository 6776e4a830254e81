"""Checkpoints with timm's names for its VisionTransformer."""

import math
import re
from pathlib import Path
from typing import Any

from vitreg_core.config import PreprocessConfig, ViTConfig, validate
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights.files import Tensors, load_checked, shape

# Heads cannot be read off the tensors; these are those of timm's ViTs of a width.
HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}

DIMS = {"cls_token": 3, "pos_embed": 3, "reg_token": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}
"""Tensors that are read before all are checked, and their dimensions; the first of three is 1."""


def load(file: Path, config: dict[str, Any], tensors: Tensors) -> VisionTransformer:
    """Build the model that the tensors describe and fill it.

    Raises:
        InputError: the tensors are not those of a plain timm ViT, or one does not fit.
    """
    model_config = infer_config(file, config, tensors)
    model = VisionTransformer(model_config, preprocess_config(file, config, model_config))
    load_checked(model, rename(tensors, model_config), file)
    return model


def infer_config(file: Path, config: dict[str, Any], tensors: Tensors) -> ViTConfig:
    """Read the shapes of the model off its tensors.

    Raises:
        InputError: a tensor that every timm ViT with a class token has is missing.
    """
    for name, dims in DIMS.items():
        if name in tensors and (tensors[name].ndim != dims or (dims == 3 and len(tensors[name]) != 1)):
            raise InputError(f"{file}: tensor {name} has shape {shape(tensors[name])}, which no timm ViT has")
        if name not in tensors and name != "reg_token":
            raise InputError(
                f"{file}: tensor {name} is missing, so this is neither our format (config.json with "
                '"library": "vitreg") nor a timm ViT; these are the two that can be read'
            )
    if config.get("global_pool", "token") not in ("token", ""):
        raise InputError(
            f"{file}: its head reads global_pool={config['global_pool']!r}; only class-token heads are read"
        )
    embed_dim, patch_size = tensors["patch_embed.proj.weight"].shape[0], tensors["patch_embed.proj.weight"].shape[-1]
    rows, has_class_row = position_rows(file, tensors)
    gamma = tensors.get("blocks.0.ls1.gamma")
    values = {
        "image_size": rows * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": 1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))),
        "num_heads": section(file, config, "model_args").get("num_heads") or num_heads(file, embed_dim),
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        "registers": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "class_position": has_class_row,
        "layer_scale": None if gamma is None else 1e-5,
        "num_classes": tensors["head.weight"].shape[0] if "head.weight" in tensors else 0,
    }
    return validate(ViTConfig, values, str(file))


def position_rows(file: Path, tensors: Tensors) -> tuple[int, bool]:
    """Side of the square position grid, and whether the class token has a row."""
    count = tensors["pos_embed"].shape[1]
    for prefix in (0, 1):
        if math.isqrt(count - prefix) ** 2 == count - prefix:
            return math.isqrt(count - prefix), bool(prefix)
    raise InputError(
        f"{file}: pos_embed of shape {shape(tensors['pos_embed'])} is no square grid with or without a class row; "
        "such a model cannot be read"
    )


def num_heads(file: Path, embed_dim: int) -> int:
    """Heads of timm's ViT of this width."""
    if embed_dim not in HEADS:
        raise InputError(
            f"{file}: the heads of a ViT of width {embed_dim} are not known; write "
            '"model_args": {"num_heads": N} into the config.json beside it'
        )
    return HEADS[embed_dim]


def preprocess_config(file: Path, config: dict[str, Any], model: ViTConfig) -> PreprocessConfig:
    """What timm would apply to an image in evaluation."""
    theirs = section(file, config, "pretrained_cfg") if "pretrained_cfg" in config else config
    size = theirs.get("input_size", [3, model.image_size, model.image_size])
    if not isinstance(size, list) or len(size) != 3:
        raise InputError(f"{file.parent / 'config.json'}: input_size={size!r} is not [3, height, width]; mend it")
    values = {
        "image_size": size[-1],
        "crop_ratio": theirs.get("crop_pct", 1.0),
        "interpolation": theirs.get("interpolation", "bicubic"),
        **{str(name): theirs[name] for name in ("mean", "std") if name in theirs},
    }
    return validate(PreprocessConfig, values, str(file.parent / "config.json"))


def section(file: Path, config: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of the config; empty where there is none."""
    values: object = config.get(name, {})
    if not isinstance(values, dict):
        raise InputError(f"{file.parent / 'config.json'}: {name}={values!r} is not an object; mend or remove it")
    return values


def rename(tensors: Tensors, config: ViTConfig) -> Tensors:
    """Our names and shapes for timm's tensors; names that are the same, or that nobody knows, stay."""
    ours = {name: tensor for name, tensor in tensors.items() if name not in {"cls_token", "reg_token", "pos_embed"}}
    positions = tensors["pos_embed"][0]
    ours["cls"] = tensors["cls_token"][0, 0]
    ours["registers.tokens"] = tensors["reg_token"][0] if config.registers else positions.new_empty(0, config.embed_dim)
    ours["positions.patches"] = positions[int(config.class_position) :]
    if config.class_position:
        ours["positions.cls"] = positions[0]
    return ours
