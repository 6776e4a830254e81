"""Image towers of open_clip: its own ViT, and those of timm inside its models."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitreg_core.config import PreprocessConfig, ViTConfig, override, validate
from vitreg_core.errors import InputError
from vitreg_core.weights import timm
from vitreg_core.weights.checkpoint import (
    CLIP_MEAN,
    CLIP_STD,
    Checkpoint,
    Names,
    Parts,
    Weights,
    describe,
    place_with_class,
    square,
    two_sides,
)

CONFIG = "open_clip_config.json"
NAMES = Names(
    stem={
        "class_embedding": "cls",
        "positional_embedding": "positions",
        "conv1": "patch_embed.proj",
        "ln_pre": "pre_norm",
        "ln_post": "norm",
        "proj": "head.weight",
    },
    blocks={
        "ln_1": "norm1",
        "attn.in_proj_weight": "attn.qkv.weight",
        "attn.in_proj_bias": "attn.qkv.bias",
        "attn.out_proj": "attn.proj",
        "ls_1.gamma": "ls1.gamma",
        "ln_2": "norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "ls_2.gamma": "ls2.gamma",
    },
    block=r"transformer\.resblocks\.(\d{1,4})\.",
)
TRUNK = "visual.trunk."
TEXT = ("text.", "text_decoder.", "transformer.", "token_embedding.", "ln_final.")
TEXT_TENSORS = {"positional_embedding", "text_projection", "logit_scale", "logit_bias", "attn_mask"}
"""Of the text tower, which stands beside `visual.` and is left out."""


def matches(checkpoint: Checkpoint) -> bool:
    """Whether there is a tower, alone or under `visual.`."""
    names = checkpoint.tensors
    return "class_embedding" in names or "visual.class_embedding" in names or any(n.startswith(TRUNK) for n in names)


def read(checkpoint: Checkpoint) -> Weights:
    """Describe the image tower.

    Raises:
        InputError: a tensor does not fit, or nothing says which GELU the weights were trained with.
    """
    tower = checkpoint.section(checkpoint.open_clip, "model_cfg", CONFIG)
    vision = checkpoint.section(tower, "vision_cfg", CONFIG)
    image = image_tower(checkpoint)
    if f"{TRUNK}registers.tokens" in checkpoint.tensors:
        return read_own_trunk(checkpoint)
    if any(name.startswith(TRUNK) for name in checkpoint.tensors):
        weights = read_trunk(image, vision)
        size = weights.config.size
        return replace(weights, preprocess=preprocess(checkpoint, size))
    parts = Parts(image, NAMES)
    if "head.weight" in parts:
        parts.shape("head.weight", 2)
        parts.tensors["head.weight"] = parts.tensors["head.weight"].T
    known = vision.get("image_size")
    size = place_with_class(parts, None if known is None else two_sides(checkpoint, CONFIG, "image_size", known))
    facts = {"image_size": square(size), "init": "clip", "position_antialias": True}
    config = describe(image, parts, {**facts, **stated(checkpoint, parts, tower, vision)})
    return Weights(config, preprocess(checkpoint, size), parts.tensors, parts.origins)


def image_tower(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without the text tower, and without the prefix of the image tower."""
    tensors = checkpoint.tensors
    if not any(name.startswith("visual.") for name in tensors):
        return checkpoint
    image = {
        name.removeprefix("visual."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(TEXT) and name not in TEXT_TENSORS
    }
    return replace(checkpoint, tensors=image)


def read_trunk(image: Checkpoint, vision: Mapping[str, Any]) -> Weights:
    """Describe a tower of timm, whose projection is its head."""
    names = {name.removeprefix("trunk."): tensor for name, tensor in image.tensors.items()}
    for kind in ("weight", "bias"):
        if f"head.proj.{kind}" in names:
            names[f"head.{kind}"] = names.pop(f"head.proj.{kind}")
    config: dict[str, Any] = {}
    if "timm_model_name" in vision:
        config = {"architecture": vision["timm_model_name"], "global_pool": vision.get("timm_pool", "avg")}
    return timm.read(replace(image, tensors=names, config=config))


def read_own_trunk(checkpoint: Checkpoint) -> Weights:
    """Describe a tower of ours inside open_clip's model, whose projection is our head.

    Raises:
        InputError: the config that we write beside it is missing or does not fit.
    """
    where = f"{checkpoint.file.parent / CONFIG}"
    ours = checkpoint.section(checkpoint.open_clip, "vitreg", CONFIG)
    vision = override(validate(ViTConfig, checkpoint.section(ours, "vision", CONFIG), where), checkpoint.given)
    tensors = {
        name.removeprefix(TRUNK): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(TRUNK)
    }
    if "visual.head.proj.weight" in checkpoint.tensors:
        tensors["head.weight"] = checkpoint.tensors["visual.head.proj.weight"]
    return Weights(vision, preprocess(checkpoint, vision.size), tensors)


def stated(
    checkpoint: Checkpoint, parts: Parts, tower: Mapping[str, Any], vision: Mapping[str, Any]
) -> dict[str, object]:
    """What the tensors of open_clip's own ViT do not tell.

    Raises:
        InputError: nothing says it, or it is what no model here does.
    """
    where = f"{checkpoint.file.parent / CONFIG}"
    if not tower and ("activation" not in checkpoint.given or "pre_norm.weight" not in parts):
        wanted = 'give activation="gelu" or "quick_gelu", or' if "pre_norm.weight" in parts else "put"
        raise InputError(
            f"{checkpoint.file}: open_clip's tensors do not tell GELU from QuickGELU, nor how a tower without ln_pre "
            f"pools; {wanted} its open_clip_config.json beside it"
        )
    for name in ("act_kwargs", "attentional_pool"):
        if vision.get(name):
            raise InputError(f"{where}: {name}={vision[name]!r} is what no model here does; give another checkpoint")
    pools = {"tok": "cls", "avg": "avg"}
    pool = vision.get("pool_type", "tok")
    if pool not in pools:
        raise InputError(f"{where}: pool_type={pool!r} is not one of {', '.join(pools)}; mend it")
    if vision.get("final_ln_after_pool"):
        for kind in ("weight", "bias"):
            parts.tensors[f"fc_norm.{kind}"] = parts.tensors.pop(f"norm.{kind}")
            parts.origins[f"fc_norm.{kind}"] = parts.origins.pop(f"norm.{kind}")
    width = parts.shape("patch_embed.proj.weight", 4)[0]
    heads = {"num_heads": width // vision.get("head_width", 64)} if vision else {}
    norm = checkpoint.section(vision, "norm_kwargs", CONFIG)
    return {
        "norm_eps": norm.get("eps", 1e-5),
        "activation": "quick_gelu" if tower.get("quick_gelu") else "gelu",
        "pool": pools[pool],
        **heads,
    }


def preprocess(checkpoint: Checkpoint, image_size: tuple[int, int]) -> PreprocessConfig:
    """What open_clip does to an image in evaluation.

    Raises:
        InputError: a setting that does not fit.
    """
    theirs = checkpoint.section(checkpoint.open_clip, "preprocess_cfg", CONFIG)
    where = f"{checkpoint.file.parent / CONFIG}"
    modes = {"shortest": "shorter", "squash": "squash"}
    mode = theirs.get("resize_mode", "shortest")
    if mode not in modes:
        raise InputError(f"{where}: resize_mode={mode!r} is not one of {', '.join(modes)}; mend it")
    values = {
        "image_size": min(image_size),
        "resize": modes[mode],
        "interpolation": theirs.get("interpolation", "bicubic"),
        "mean": theirs.get("mean", CLIP_MEAN),
        "std": theirs.get("std", CLIP_STD),
    }
    return validate(PreprocessConfig, values, where)
