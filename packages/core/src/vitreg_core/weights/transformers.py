"""Checkpoints with transformers' names: ViT, DINOv2 with and without registers, DINOv3 and CLIP's image tower.

Files of transformers 4 and 5 name some tensors differently; both are read.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from vitreg_core.config import PreprocessConfig, validate
from vitreg_core.errors import InputError
from vitreg_core.weights import dinov3
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

NAMES = Names(
    stem={
        "embeddings.cls_token": "cls",
        "embeddings.class_embedding": "cls",
        "embeddings.mask_token": "mask_token",
        "embeddings.register_tokens": "registers.tokens",
        "embeddings.position_embeddings": "positions",
        "embeddings.position_embedding.weight": "positions",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.patch_embeddings": "patch_embed.proj",
        "embeddings.patch_embedding": "patch_embed.proj",
        "pre_layrnorm": "pre_norm",  # so spelt in every file
        "layernorm": "norm",
        "post_layernorm": "norm",
        "norm": "norm",
        "classifier": "head",
        "visual_projection.weight": "head.weight",
    },
    blocks={
        "norm1": "norm1",
        "layer_norm1": "norm1",
        "layernorm_before": "norm1",
        **{f"attention.attention.{part}": f"attn.{part[0]}" for part in ("query", "key", "value")},
        **{f"attention.{part}_proj": f"attn.{part}" for part in "qkv"},
        **{f"self_attn.{part}_proj": f"attn.{part}" for part in "qkv"},
        "attention.output.dense": "attn.proj",
        "attention.o_proj": "attn.proj",
        "self_attn.out_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "norm2": "norm2",
        "layer_norm2": "norm2",
        "layernorm_after": "norm2",
        "mlp.fc1": "mlp.fc1",
        "intermediate.dense": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "output.dense": "mlp.fc2",
        "mlp.weights_in": "mlp.w12",
        "mlp.weights_out": "mlp.w3",
        "mlp.gate_proj": "mlp.w1",
        "mlp.up_proj": "mlp.w2",
        "mlp.down_proj": "mlp.w3",
        "layer_scale2.lambda1": "ls2.gamma",
    },
    block=r"(?:encoder\.|model\.)?layers?\.(\d{1,4})\.",
    prefix=r"vit\.|dinov2\.|dinov2_with_registers\.|vision_model\.",
    # the pooler and CLIP's text tower do not act on tokens of images; old files hold the numbers of positions
    dropped=r"(?:vit\.)?pooler\.dense\.|text_model\.|text_projection\.|logit_scale$|.*embeddings\.position_ids$",
)


def matches(checkpoint: Checkpoint) -> bool:
    """Whether class token and patches are named as in transformers."""
    return any(name.endswith(("embeddings.cls_token", "embeddings.class_embedding")) for name in checkpoint.tensors)


def read(checkpoint: Checkpoint) -> Weights:
    """Describe the model.

    Raises:
        InputError: a tensor does not fit, or `config.json` is missing or says what no model here does.
    """
    settings = image_settings(checkpoint)
    parts = Parts(checkpoint, NAMES)
    pack_qkv(parts, without_key_bias="positions" not in parts)
    facts: dict[str, object] = {
        "num_heads": settings["num_attention_heads"],
        "norm_eps": settings["layer_norm_eps"],
    }
    size = two_sides(checkpoint, "config.json", "image_size", settings.get("image_size", 224))
    if "positions" in parts:
        size = place_with_class(parts, size)
        facts["position_antialias"] = "registers.tokens" in parts
    else:
        rename_mlp(parts)
        facts = {**dinov3.finish(parts), **facts, "rope_base": rope_base(settings)}
    if "pre_norm.weight" in parts:
        facts["init"] = "clip"
    join_gate(parts)
    facts |= activation(checkpoint, parts, settings)
    refuse_head(parts)
    config = describe(checkpoint, parts, {"image_size": square(size), **facts})
    return Weights(config, preprocess(checkpoint, size), parts.tensors, parts.origins)


def image_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What `config.json` says of the image model.

    Raises:
        InputError: there is none, or it says too little.
    """
    config = checkpoint.section(checkpoint.config, "vision_config") or checkpoint.config
    for name in ("num_attention_heads", "layer_norm_eps", "hidden_act"):
        if name not in config:
            raise InputError(
                f"{checkpoint.file.parent / 'config.json'}: no {name}, which the tensors do not tell; "
                "put the config.json of the model beside its weights"
            )
    return config


def rope_base(settings: Mapping[str, Any]) -> object:
    """Base of the rotary embedding, which has had two places in `config.json`."""
    nested = settings.get("rope_parameters")
    return settings.get("rope_theta") or (nested.get("rope_theta") if isinstance(nested, dict) else None) or dinov3.BASE


def pack_qkv(parts: Parts, *, without_key_bias: bool) -> None:
    """Stack queries, keys and values of every block; DINOv3's keys have no bias, which is one of 0."""
    for index in range(parts.depth):
        names = [f"blocks.{index}.attn.{part}" for part in "qkv"]
        parts.join([f"{name}.weight" for name in names], f"blocks.{index}.attn.qkv.weight")
        if f"{names[0]}.bias" in parts:
            if without_key_bias and f"{names[1]}.bias" not in parts:
                parts.tensors[f"{names[1]}.bias"] = torch.zeros_like(parts.tensors[f"{names[0]}.bias"])
                parts.origins[f"{names[1]}.bias"] = f"{names[1]}.bias"
            parts.join([f"{name}.bias" for name in names], f"blocks.{index}.attn.qkv.bias")


def rename_mlp(parts: Parts) -> None:
    """Give our names to DINOv3's MLP without a gate, which is named as the one with a gate."""
    if "blocks.0.mlp.w1.weight" in parts:
        return
    for name in list(parts.tensors):
        ours = name.replace(".mlp.w2.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        parts.tensors[ours] = parts.tensors.pop(name)
        if name in parts.origins:
            parts.origins[ours] = parts.origins.pop(name)


def join_gate(parts: Parts) -> None:
    """Pack the gates that newer files keep apart."""
    for index in range(parts.depth):
        if f"blocks.{index}.mlp.w1.weight" in parts:
            for kind in ("weight", "bias"):
                names = [f"blocks.{index}.mlp.{part}.{kind}" for part in ("w1", "w2")]
                parts.join(names, f"blocks.{index}.mlp.w12.{kind}")


def activation(checkpoint: Checkpoint, parts: Parts, settings: Mapping[str, Any]) -> dict[str, object]:
    """Activation of the MLP.

    Raises:
        InputError: it is another than GELU, QuickGELU, or the gate's SiLU.
    """
    name = settings["hidden_act"]
    gated = "blocks.0.mlp.w12.weight" in parts
    learned = "positions" in parts or "positions.patches" in parts
    if gated and learned:  # DINOv2's gate is SiLU, whatever the config says
        return {}
    known = ("silu",) if gated else ("gelu", "quick_gelu")
    if name not in known:
        raise InputError(
            f"{checkpoint.file.parent / 'config.json'}: hidden_act={name!r} is not {' or '.join(known)}, "
            "and no other can be computed"
        )
    return {} if gated else {"activation": name}


def refuse_head(parts: Parts) -> None:
    """Refuse DINOv2's classifier, which reads class token and mean of the patches side by side.

    Raises:
        InputError: the weights have such a head.
    """
    width = parts.shape("patch_embed.proj.weight", 4)[0]
    if "head.weight" in parts and parts.shape("head.weight", 2)[1] == 2 * width:
        raise InputError(
            f"{parts.file}: its classifier reads class token and patches side by side, which no head here does; "
            "give the same model without a classifier"
        )


def preprocess(checkpoint: Checkpoint, image_size: tuple[int, int]) -> PreprocessConfig:
    """What the image processor beside the weights does, or, without one, ImageNet's evaluation.

    Raises:
        InputError: it does what cannot be done here.
    """
    theirs = checkpoint.processor
    clip = str(checkpoint.config.get("model_type", "")).startswith("clip")
    usual = (CLIP_MEAN, CLIP_STD) if clip else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if not theirs:
        return PreprocessConfig(image_size=min(image_size), mean=usual[0], std=usual[1])
    where = f"{checkpoint.file.parent / 'preprocessor_config.json'}"
    refuse_steps(theirs, where)
    filters = {2: "bilinear", 3: "bicubic"}
    resample = theirs.get("resample", 2)
    if resample not in filters:
        raise InputError(f"{where}: resample={resample!r} is not 2 (bilinear) or 3 (bicubic); mend it")
    size = theirs.get("size", min(image_size))
    crops = theirs.get("do_center_crop", "crop_size" in theirs)
    side, crop = one_side(size), one_side(theirs.get("crop_size") if crops else size)
    if side is None or crop is None or crop > side:
        raise InputError(f"{where}: size={size!r} with crop_size={theirs.get('crop_size')!r} cannot be done; mend it")
    values = {
        "image_size": crop,
        "crop_ratio": ratio(crop, side),
        "crop_corner": "floor",
        "resize": "shorter" if keeps_aspect(theirs, size) else "squash",
        "interpolation": filters[resample],
        "mean": theirs.get("image_mean", usual[0]),
        "std": theirs.get("image_std", usual[1]),
    }
    if theirs.get("do_normalize") is False:
        values |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return validate(PreprocessConfig, values, where)


def keeps_aspect(theirs: Mapping[str, Any], size: object) -> bool:
    """Whether the shorter side is resized: said by the name of the size, or, of a mere number, by the processor's."""
    if isinstance(size, dict):
        return "shortest_edge" in size
    kind = str(theirs.get("image_processor_type", theirs.get("feature_extractor_type", "")))
    return kind.startswith(("CLIP", "Bit"))


def refuse_steps(theirs: Mapping[str, Any], where: str) -> None:
    """Refuse processors that leave pixels as they come, or scale them otherwise.

    Raises:
        InputError: names the setting.
    """
    for name, wanted in {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255}.items():
        value = theirs.get(name, wanted)
        if not isinstance(value, int | float) or abs(value - wanted) > 1e-9:
            raise InputError(f"{where}: {name}={value!r} cannot be done, only {wanted}; mend it")


def one_side(size: object) -> int | None:
    """Pixels of a size that has one side only: a number, a square, or a shorter edge; None for any other."""
    sides = set(size.values()) if isinstance(size, dict) else {size}
    known = not isinstance(size, dict) or size.keys() in ({"height", "width"}, {"shortest_edge"})
    side = sides.pop() if len(sides) == 1 and known else None
    return side if isinstance(side, int) and side > 0 else None


def ratio(crop: int, side: int) -> float:
    """The crop's share of the side, such that dividing by it and rounding down gives the side again."""
    share = crop / side
    return share if int(crop / share) == side else math.nextafter(share, 0)
