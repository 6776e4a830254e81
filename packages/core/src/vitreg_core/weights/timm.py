"""Checkpoints with timm's names: its VisionTransformer, and its Eva as DINOv3 uses it."""

import re
from collections.abc import Mapping
from typing import Any

from vitreg_core.config import PreprocessConfig, validate
from vitreg_core.errors import InputError
from vitreg_core.weights import dinov3
from vitreg_core.weights.checkpoint import (
    PLAIN_BLOCKS,
    PLAIN_STEM,
    Checkpoint,
    Names,
    Parts,
    Weights,
    describe,
    place,
    square,
    two_sides,
)

NAMES = Names(
    stem={
        **PLAIN_STEM,
        "reg_token": "registers.tokens",
        "norm_pre": "pre_norm",
        "fc_norm": "fc_norm",
        "head": "head",
    },
    blocks={
        **PLAIN_BLOCKS,
        "attn.q_norm": "attn.q_norm",
        "attn.k_norm": "attn.k_norm",
        "ls1.gamma": "ls1.gamma",
        "ls2.gamma": "ls2.gamma",
    },
)
ROTARY_NAMES = Names(
    stem={**PLAIN_STEM, "reg_token": "registers.tokens", "fc_norm": "fc_norm", "head": "head"},
    blocks={
        **PLAIN_BLOCKS,
        "attn.q_bias": "attn.q.bias",
        "attn.v_bias": "attn.v.bias",
        "gamma_1": "ls1.gamma",
        "mlp.fc1_g": "mlp.w1",
        "mlp.fc1_x": "mlp.w2",
        "gamma_2": "ls2.gamma",
    },
)
"""Of DINOv3 in timm."""
LOOKALIKES = re.compile(r"siglip|_rpn_|_rope_|^vit_pe_|^eva|^beit")
"""Architectures that share names with a plain ViT, and compute something else."""
HEADS_OF = {"vit_base_patch16_gap_224": 16}
"""Architectures with other heads than the rest of their width."""
READ_ARGUMENTS = {
    "act_layer", "class_token", "depth", "drop_path_rate", "drop_rate", "dynamic_img_size", "embed_dim", "fc_norm",
    "global_pool", "img_size", "init_values", "mlp_ratio", "no_embed_class", "num_classes", "num_heads", "patch_size",
    "pre_norm", "proj_bias", "qk_norm", "qkv_bias", "reg_tokens", "weight_init",
}  # fmt: skip
"""Arguments of timm's constructor that are followed, or that tensors tell as well."""
POOLS = {"token": "cls", "": "cls", "avg": "avg"}


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the names are timm's; several official ones are the same, so this is asked last."""
    return "patch_embed.proj.weight" in checkpoint.tensors and "blocks.0.norm1.weight" in checkpoint.tensors


def read(checkpoint: Checkpoint) -> Weights:
    """Describe the model.

    Raises:
        InputError: it is not a plain ViT, a tensor does not fit, or the config files do not say what must be known.
    """
    architecture = str(checkpoint.config.get("architecture", ""))
    refuse_lookalikes(checkpoint, architecture)
    parts = Parts(checkpoint, NAMES if "pos_embed" in checkpoint.tensors else ROTARY_NAMES)
    size = stated_size(checkpoint)
    facts: dict[str, object] = {"pool": pool(checkpoint, parts)}
    refuse_arguments(checkpoint)
    if "positions" in parts:
        image_size = add_positions(parts, size)
        pack_swiglu(parts)
        facts |= {"norm_eps": 1e-6, **clip_facts(checkpoint, parts, architecture)}
    else:
        image_size = size or (224, 224)
        facts |= dinov3.finish(parts)
    if architecture in HEADS_OF:
        facts["num_heads"] = HEADS_OF[architecture]
    stated = checkpoint.section(checkpoint.config, "model_args").get("act_layer")
    if stated is not None:
        facts["activation"] = stated
    facts |= checkpoint.section(checkpoint.config, "vitreg")  # what timm's config cannot say, where we wrote it
    config = describe(checkpoint, parts, {"image_size": square(image_size), **facts})
    return Weights(config, preprocess(checkpoint, image_size), parts.tensors, parts.origins)


def refuse_lookalikes(checkpoint: Checkpoint, architecture: str) -> None:
    """Refuse models that compute something else with tensors of the same names.

    Raises:
        InputError: such a model, or one that cannot be told from such a model without a config.
    """
    names = checkpoint.tensors
    if LOOKALIKES.search(architecture):
        raise InputError(f"{checkpoint.file}: {architecture} has other blocks than a plain ViT, and cannot be read")
    if "pos_embed" not in names and "dinov3" not in architecture:
        raise InputError(
            f"{checkpoint.file}: tensor pos_embed is missing, and of timm's ViTs without it only DINOv3 can be read; "
            'if it is one, write "architecture": "vit_..._dinov3" into the config.json beside it'
        )
    if "cls_token" not in names and "reg_token" not in names and not architecture:
        raise InputError(
            f"{checkpoint.file}: tensor cls_token is missing, and timm's ViTs without it differ in more than names; "
            'write their "architecture" into the config.json beside it'
        )


def refuse_arguments(checkpoint: Checkpoint) -> None:
    """Refuse arguments of timm's constructor that may change what is computed.

    Raises:
        InputError: names the argument.
    """
    for name, value in checkpoint.section(checkpoint.config, "model_args").items():
        if name not in READ_ARGUMENTS and "vitreg" not in checkpoint.config:
            raise InputError(
                f"{checkpoint.file.parent / 'config.json'}: model_args {name}={value!r} cannot be followed; if it "
                "changes nothing that the model computes, remove it"
            )


def pool(checkpoint: Checkpoint, parts: Parts) -> str:
    """What the head reads.

    Raises:
        InputError: neither the class token nor the mean of the patches.
    """
    usual = "avg" if "fc_norm.weight" in parts or "cls" not in parts else "token"
    stated = checkpoint.config.get("global_pool", usual)
    if stated not in POOLS:
        raise InputError(
            f"{checkpoint.file}: its head reads global_pool={stated!r}; only heads on the class token or the mean of "
            'the patches ("token", "avg") are read'
        )
    return "avg" if "cls" not in parts else POOLS[stated]


def add_positions(parts: Parts, size: tuple[int, int] | None) -> tuple[int, int]:
    """Take positions apart; returns the image size they fit.

    A table with rows for registers is folded into class token and registers, to which they would be added anyway.
    """
    classes = int("cls" in parts)
    registers = parts.shape("registers.tokens", 2)[0] if "registers.tokens" in parts else 0
    rows, image_size = place(parts, sorted({0, classes, classes + registers}), size)
    if registers and len(rows) == classes + registers:
        parts.tensors["registers.tokens"] = parts.tensors["registers.tokens"] + rows[classes:]
        if classes:
            parts.tensors["cls"] = parts.tensors["cls"] + rows[0]
    elif len(rows):
        parts.tensors["positions.cls"] = rows[0]
        parts.origins["positions.cls"] = parts.origins["positions.patches"]
    return image_size


def pack_swiglu(parts: Parts) -> None:
    """Give our names to timm's packed SwiGLU, which has twice as many outputs in front as inputs behind."""
    if "blocks.0.mlp.fc2.weight" not in parts:
        return
    if parts.shape("blocks.0.mlp.fc1.weight", 2)[0] == 2 * parts.shape("blocks.0.mlp.fc2.weight", 2)[1]:
        for name in list(parts.tensors):
            ours = name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
            parts.tensors[ours], parts.origins[ours] = parts.tensors.pop(name), parts.origins.pop(name, name)


def clip_facts(checkpoint: Checkpoint, parts: Parts, architecture: str) -> dict[str, object]:
    """Epsilon and activation of timm's CLIP towers.

    Raises:
        InputError: nothing says which GELU the weights were trained with.
    """
    if "pre_norm.weight" not in parts:
        return {}
    stated = checkpoint.section(checkpoint.config, "model_args").get("act_layer")
    if not architecture and stated is None and "activation" not in checkpoint.given:
        raise InputError(
            f"{checkpoint.file}: a CLIP tower with GELU or with QuickGELU, which its tensors do not tell; give "
            'activation="gelu" or "quick_gelu", or the config.json with timm\'s "architecture" beside it'
        )
    return {"norm_eps": 1e-5, "init": "clip"} | ({"activation": "quick_gelu"} if "quickgelu" in architecture else {})


def stated_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Height and width in pixels that the model was built for, as far as the config says.

    Raises:
        InputError: it is no size.
    """
    built = checkpoint.section(checkpoint.config, "model_args").get("img_size")
    if built is not None:
        return two_sides(checkpoint, "config.json", "img_size", built)
    return input_size(checkpoint)


def input_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Height and width in pixels of the images that the config prepares.

    Raises:
        InputError: it is no size.
    """
    size = settings(checkpoint).get("input_size")
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 3:
        where = checkpoint.file.parent / "config.json"
        raise InputError(f"{where}: input_size={size!r} is not [3, height, width]; mend it")
    return two_sides(checkpoint, "config.json", "input_size", size[1:])


def settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """How timm prepares images for the model."""
    config = checkpoint.config
    return checkpoint.section(config, "pretrained_cfg") if "pretrained_cfg" in config else config


def preprocess(checkpoint: Checkpoint, image_size: tuple[int, int]) -> PreprocessConfig:
    """What timm would apply to an image in evaluation; ImageNet's mean and std where no config says.

    Raises:
        InputError: a setting that does not fit.
    """
    theirs, where = settings(checkpoint), f"{checkpoint.file.parent / 'config.json'}"
    modes = {"center": "shorter", "squash": "squash"}
    mode = theirs.get("crop_mode") or "center"
    if mode not in modes:
        raise InputError(f"{where}: crop_mode={mode!r} is not one of {', '.join(modes)}; mend it")
    values = {
        "image_size": (input_size(checkpoint) or image_size)[-1],
        "crop_ratio": theirs.get("crop_pct", 0.875),
        "resize": modes[mode],
        "interpolation": theirs.get("interpolation", "bicubic"),
        **{str(name): theirs[name] for name in ("mean", "std") if name in theirs},
    }
    return validate(PreprocessConfig, values, where)
