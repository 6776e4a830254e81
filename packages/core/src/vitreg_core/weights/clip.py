"""Dual encoders on the disk: open_clip's folders and files, with image towers of its own or of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitreg_core.clip import ClipConfig, DualEncoder, TextConfig
from vitreg_core.config import ViTConfig, validate
from vitreg_core.errors import InputError
from vitreg_core.weights.families import read_model
from vitreg_core.weights.files import Tensors, check_tensors, read_config, read_tensors, weights_file, write_folder
from vitreg_core.weights.openclip import CONFIG, NAMES, TEXT_TENSORS
from vitreg_core.weights.sources import locate

WEIGHTS = "open_clip_model.safetensors"
TEXT = {
    "transformer.",
    "token_embedding.",
    "ln_final.",
    "positional_embedding",
    "text_projection",
}
"""What the names of the text tower begin with, in the root of open_clip's CLIP or under `text.`."""
SHARED = {"logit_scale", "logit_bias"}


def load_clip(source: str | Path) -> DualEncoder:
    """Load a dual encoder.

    Args:
        source: a folder that open_clip or a run wrote, `open_clip:ARCH/TAG`, or `hub:org/name`.

    Returns:
        The model in evaluation mode on the CPU, in float32.

    Raises:
        InputError: nothing there, a text tower that is not open_clip's own, or a tensor that is missing or misshapen.
    """
    file = weights_file(locate(str(source)))
    stated = read_config(file.parent / CONFIG).get("model_cfg", {})
    tensors = read_tensors(file)
    visual = read_model(file)
    if not visual.config.num_classes:
        raise InputError(f"{file}: no projection of the image tower, so no joint space; give a dual encoder")
    config = ClipConfig(vision=visual.config, text=text_config(stated, tensors, file), bias="logit_bias" in tensors)
    with torch.device("meta"):
        model = DualEncoder(config, visual.preprocess.config, source=str(source))
    model.visual = visual
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith("visual.")}
    found = text_tensors(tensors) | {name: tensors[name].reshape(()) for name in SHARED & tensors.keys()}
    check_tensors(rest, found, file, {})
    model.load_state_dict({name: value.float() for name, value in found.items()}, strict=False, assign=True)
    length = config.text.context_length  # the causal mask is a buffer that no file holds
    model.text.register_buffer("attn_mask", torch.full((length, length), -torch.inf).triu(1), persistent=False)
    return model.eval()


def text_config(stated: Mapping[str, Any], tensors: Tensors, file: Path) -> TextConfig:
    """Shapes of the text tower, from the config beside the weights, or else from the tensors.

    Raises:
        InputError: no text tower, or one of another kind.
    """
    text = text_tensors(tensors)
    if "text.token_embedding.weight" not in text or "text.positional_embedding" not in text:
        raise InputError(f"{file}: no text tower of open_clip in it; give a dual encoder with one")
    vocab, width = text["text.token_embedding.weight"].shape
    layers = {name.split(".")[3] for name in text if name.startswith("text.transformer.resblocks.")}
    shapes = {
        "context_length": len(text["text.positional_embedding"]),
        "vocab_size": vocab,
        "width": width,
        "layers": len(layers),
        "heads": width // 64,
    }
    given = stated.get("text_cfg", {})
    known = {name: given[name] for name in shapes if name in given}
    return validate(TextConfig, {**shapes, **known}, str(file.parent / CONFIG))


def text_tensors(tensors: Tensors) -> Tensors:
    """Tensors of the text tower, under `text.`."""
    return {
        name if name.startswith("text.") else f"text.{name}": tensor
        for name, tensor in tensors.items()
        if name.startswith(("text.", *TEXT)) and not name.endswith("attn_mask")
    }


def save_clip(model: DualEncoder, folder: Path) -> None:
    """Write a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` opens.

    Without registers the image tower is open_clip's own. With registers it is ours in timm's registry, so that
    `vitreg_core.timm.register_open_clip(FOLDER)` must come first.

    Raises:
        InputError: open_clip has no such tower (names the field), or the folder cannot be written.
    """
    vision, text = model.config.vision, model.config.text
    refuse(vision, folder)
    ours = model.visual.state_dict()
    tower = trunk(vision) if vision.registers else native(vision)
    visual = trunk_tensors(ours) if vision.registers else native_tensors(ours)
    rest = {name.removeprefix("text."): value for name, value in model.state_dict().items() if name.startswith("text.")}
    shared = {name: value for name, value in model.state_dict().items() if name in TEXT_TENSORS & SHARED}
    preprocess = model.visual.preprocess.config
    config = {
        "model_cfg": {
            "embed_dim": vision.num_classes,
            "quick_gelu": vision.activation == "quick_gelu",
            "vision_cfg": tower,
            "text_cfg": text.model_dump(),
            **({"init_logit_bias": -10.0} if model.config.bias else {}),
        },
        "preprocess_cfg": {
            "size": list(vision.size),
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "interpolation": preprocess.interpolation,
            "resize_mode": "squash" if preprocess.resize == "squash" else "shortest",
        },
        "vitreg": {"vision": vision.model_dump(mode="json")},
    }
    write_folder({**visual, **rest, **shared}, config, folder, names=(WEIGHTS, CONFIG))


def refuse(vision: ViTConfig, folder: Path) -> None:
    """Refuse a tower that open_clip's cannot stand for.

    Raises:
        InputError: names the field.
    """
    if vision.registers:
        return
    wanted = {
        "pre_norm": True,
        "patch_bias": False,
        "head_bias": False,
        "class_token": True,
        "class_position": True,
        "norm_eps": 1e-5,
        "position": "learned",
        "feed_forward": "mlp",
        "pool": "cls",
        "norm_pooled": False,
        "qkv_bias": True,
        "qk_norm": False,
        "mask_token": False,
    }
    for name, value in wanted.items():
        if getattr(vision, name) != value:
            found = getattr(vision, name)
            raise InputError(f"{folder}: {name}={found!r} cannot be written for open_clip, whose tower has {value!r}")


def native(vision: ViTConfig) -> dict[str, object]:
    """The config of open_clip's own image tower."""
    return {
        "image_size": list(vision.size),
        "patch_size": vision.patch_size,
        "width": vision.embed_dim,
        "layers": vision.depth,
        "head_width": vision.embed_dim // vision.num_heads,
        "mlp_ratio": vision.mlp_ratio,
        "ls_init_value": vision.layer_scale,
    }


def native_tensors(ours: Tensors) -> Tensors:
    """Tensors in the names of open_clip's own image tower."""
    stem = {mine: theirs for theirs, mine in NAMES.stem.items()}
    inside = {mine: theirs for theirs, mine in NAMES.blocks.items()}

    def translate(name: str) -> str:
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            module = rest if rest in inside else rest.rpartition(".")[0]
            return f"transformer.resblocks.{number}.{inside[module]}{rest.removeprefix(module)}"
        module = name if name in stem else name.rpartition(".")[0]
        return f"{stem[module]}{name.removeprefix(module)}"

    special = {"positions.cls", "positions.patches", "head.weight", "registers.tokens"}
    found = {translate(name): value for name, value in ours.items() if name not in special}
    found["positional_embedding"] = torch.cat([ours["positions.cls"][None], ours["positions.patches"]])
    found["proj"] = ours["head.weight"].T
    return {f"visual.{name}": value for name, value in found.items()}


def trunk(vision: ViTConfig) -> dict[str, object]:
    """The config of an image tower that is our model in timm's registry."""
    name = "vitreg_clip_" + "_".join(
        f"{letter}{value}"
        for letter, value in (
            ("s", max(vision.size)),
            ("p", vision.patch_size),
            ("d", vision.embed_dim),
            ("l", vision.depth),
            ("h", vision.num_heads),
            ("reg", vision.registers),
        )
    )
    return {"timm_model_name": name, "timm_pool": "token", "timm_proj": "linear", "image_size": list(vision.size)}


def trunk_tensors(ours: Tensors) -> Tensors:
    """Tensors of a tower in timm's registry, whose projection is a head of open_clip's."""
    found = {f"visual.trunk.{name}": value for name, value in ours.items() if name != "head.weight"}
    return {**found, "visual.head.proj.weight": ours["head.weight"]}
