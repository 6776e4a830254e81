"""Models written for other libraries: a folder that timm and transformers open, and DINOv2's own names."""

import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from vitreg_core.backbones.adapter import Adapter
from vitreg_core.config import PreprocessConfig, ViTConfig, override
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights.files import Tensors, write_folder
from vitreg_core.weights.native import unchanged

CARRIERS = {
    ("mlp", 1e-6): "vit_base_patch16_224",
    ("mlp", 1e-5): "vit_base_patch16_clip_224",
    ("swiglu", 1e-6): "vit_giant_patch14_dinov2",
}
"""Architectures of timm whose kind of MLP and epsilon a config.json cannot name; it replaces all else about them."""

Wanted = tuple[str, bool, str]
"""A field of the config, whether it can be written, and what can."""


def save_timm(model: VisionTransformer, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` in timm's layout, for timm, for transformers, and for us.

    Opens as `timm.create_model("local-dir:FOLDER", pretrained=True)` and `AutoModel.from_pretrained(FOLDER)`, with the
    same tokens for every image size that the patch divides. With registers, the position of the class token is added to
    the class token, as timm does it. The mask token, which takes part in training only, is left out.

    Raises:
        InputError: timm's ViT cannot compute what the model does (names the field), or the folder cannot be written.
    """
    config = model.config
    carrier = CARRIERS.get((config.feed_forward, config.norm_eps))
    refuse(
        folder,
        "timm",
        model,
        [
            ("position", config.position == "learned", "learned positions"),
            ("position_offset", config.position_offset == 0, "0, as timm resizes"),
            ("position_antialias", config.position_antialias, "True, as timm resizes"),
            ("patch_bias", not (config.pre_norm and config.patch_bias), "False where pre_norm is True"),
            ("norm_eps", carrier is not None, "1e-6, or 1e-5 with an MLP"),
        ],
    )
    written = override(config, {"class_position": config.class_position and not config.registers, "mask_token": False})
    settings = {
        "architecture": carrier,
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "global_pool": timm_pool(config),
        "model_args": timm_arguments(config),
        "pretrained_cfg": timm_preprocess(config, model.preprocess.config),
        "vitreg": override(written, {"head_bias": True, "patch_bias": not config.pre_norm}).model_dump(mode="json"),
    }
    write_folder(timm_tensors(config, model.state_dict()), settings, folder)


def timm_arguments(config: ViTConfig) -> dict[str, object]:
    """What timm's constructor is called with; the number of classes is not among it, as transformers gives its own."""
    swiglu = config.feed_forward == "swiglu"
    hidden = 2 * config.hidden_dim if swiglu else config.hidden_dim
    arguments: dict[str, object] = {
        "img_size": list(config.size),
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": (hidden + 0.5) / config.embed_dim,  # timm rounds down
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "init_values": config.layer_scale,
        "class_token": config.class_token,
        "no_embed_class": not config.class_position or config.registers > 0,
        "reg_tokens": config.registers,
        "pre_norm": config.pre_norm,
        "fc_norm": config.norm_pooled,
        "global_pool": timm_pool(config),
        "dynamic_img_size": True,
    }
    return arguments if swiglu else {**arguments, "act_layer": config.activation}


def timm_pool(config: ViTConfig) -> str:
    """What the head reads, in timm's word."""
    return "token" if config.pool == "cls" else "avg"


def timm_preprocess(config: ViTConfig, preprocess: PreprocessConfig) -> dict[str, object]:
    """How timm prepares images for the model."""
    return {
        "input_size": [3, preprocess.image_size, preprocess.image_size],
        "fixed_input_size": False,
        "crop_pct": preprocess.crop_ratio,
        "crop_mode": "center" if preprocess.resize == "shorter" else preprocess.resize,
        "interpolation": preprocess.interpolation,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "num_classes": config.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def timm_tensors(config: ViTConfig, ours: Tensors) -> Tensors:
    """Timm's names and shapes, with zeros for biases that timm always has."""
    theirs = {
        name.replace("pre_norm.", "norm_pre.").replace(".w12.", ".fc1.").replace(".w3.", ".fc2."): tensor
        for name, tensor in ours.items()
        if "." in name and not name.startswith(("positions.", "registers."))
    }
    table = ours["positions.patches"]
    if config.class_token:
        folded = config.class_position and config.registers
        theirs["cls_token"] = (ours["cls"] + ours["positions.cls"] if folded else ours["cls"])[None, None]
        if config.class_position and not folded:
            table = torch.cat([ours["positions.cls"][None], table])
    if config.registers:
        theirs["reg_token"] = ours["registers.tokens"][None]
    if config.num_classes and not config.head_bias:
        theirs["head.bias"] = table.new_zeros(config.num_classes)
    if not config.patch_bias and not config.pre_norm:
        theirs["patch_embed.proj.bias"] = table.new_zeros(config.embed_dim)
    return {**theirs, "pos_embed": table[None]}


def save_dinov2(model: VisionTransformer, folder: Path) -> None:
    """Write `model.pth`, a flat state dict in DINOv2's names, for `load_state_dict` of its models.

    What DINOv2 always has and the model has not is written so that it changes nothing: zeros for the mask token and for
    the position of the class token, ones for LayerScale. The file does not say how positions are resized; DINOv2's
    register models do it as `position_offset=0`, `position_antialias=True`, its others as 0.1 and False.

    Raises:
        InputError: DINOv2's model cannot compute what the model does (names the field), or the file cannot be written.
    """
    if (folder / "model.safetensors").exists():
        raise InputError(f"{folder}: holds a model in another layout, which would be read in its place; give another")
    config = model.config
    multiple = config.feed_forward == "mlp" or config.hidden_dim % 8 == 0
    refuse(
        folder,
        "dinov2",
        model,
        [
            ("position", config.position == "learned", "learned positions"),
            ("image_size", config.grid[0] == config.grid[1], "a square grid of patches"),
            ("class_token", config.class_token, "True"),
            ("pre_norm", not config.pre_norm, "False"),
            ("norm_pooled", not config.norm_pooled, "False"),
            ("num_classes", config.num_classes == 0, "0; drop the head by model.reset_classifier(0)"),
            ("patch_bias", config.patch_bias, "True"),
            ("qkv_bias", config.qkv_bias, "True"),
            ("qk_norm", not config.qk_norm, "False"),
            ("activation", config.activation == "gelu" or config.feed_forward == "swiglu", "gelu"),
            ("norm_eps", config.norm_eps == 1e-6, "1e-6"),
            ("swiglu_align", multiple, "a multiple of 8"),
        ],
    )
    usual = (0.0, True) if config.registers else (0.1, False)
    if (config.position_offset, config.position_antialias) != usual:
        warnings.warn(
            f"{folder}: DINOv2's model of this kind resizes positions otherwise; build it with "
            f"interpolate_offset={config.position_offset}, interpolate_antialias={config.position_antialias}",
            stacklevel=3,
        )
    write_file(dinov2_tensors(config, model.state_dict()), folder / "model.pth")


def dinov2_tensors(config: ViTConfig, ours: Tensors) -> Tensors:
    """DINOv2's names and shapes."""
    patches = ours["positions.patches"]
    first = ours["positions.cls"] if config.class_position else torch.zeros_like(ours["cls"])
    theirs = {
        "cls_token": ours["cls"][None, None],
        "pos_embed": torch.cat([first[None], patches])[None],
        "mask_token": (ours["mask_token"] if config.mask_token else torch.zeros_like(ours["cls"]))[None],
    }
    if config.registers:
        theirs["register_tokens"] = ours["registers.tokens"][None]
    if config.layer_scale is None:
        scales = (f"blocks.{index}.ls{branch}.gamma" for index in range(config.depth) for branch in (1, 2))
        theirs |= {name: torch.ones_like(ours["cls"]) for name in scales}
    kept = (name for name in ours if name.startswith(("patch_embed.", "blocks.", "norm.")))
    return {**theirs, **{name: ours[name] for name in kept}}


def refuse_foreign(model: object) -> None:
    """Refuse what is no vitreg model.

    Raises:
        InputError: says what can be saved.
    """
    if not isinstance(model, VisionTransformer):
        kind = type(model.model if isinstance(model, Adapter) else model).__name__
        raise InputError(
            f"{kind} is no vitreg model and cannot be written by save_model; open its weights by load_model(SOURCE) "
            "and save that, or use its own library"
        )


def refuse(folder: Path, layout: str, model: VisionTransformer, fields: list[Wanted]) -> None:
    """Refuse a model that another library's cannot stand for.

    Raises:
        InputError: names the first field, its value, and what can be written.
    """
    unchanged(model, folder)
    for name, fits, wanted in [("moved", model.config.moved is None, 'none; save it as "vitreg"'), *fields]:
        if not fits:
            value = getattr(model.config, name)
            raise InputError(f'{folder}: {name}={value!r} cannot be written as "{layout}", which needs {wanted}')


def write_file(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a .pth file whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
            torch.save({name: tensor.cpu().clone() for name, tensor in tensors.items()}, Path(temporary, "weights"))
            Path(temporary, "weights").replace(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error}); give another folder") from None
