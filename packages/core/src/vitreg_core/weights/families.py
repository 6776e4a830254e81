"""Read a model from a file or folder on this machine: find its family, map its names, check every tensor."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from vitreg_core.config import ViTConfig, field_names, nearest, override
from vitreg_core.errors import InputError
from vitreg_core.initialise import RECIPE_STD, fill
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights import deit3, dino, dinov2, dinov3, mae, native, openclip, timm, transformers
from vitreg_core.weights.checkpoint import Checkpoint, Weights
from vitreg_core.weights.files import Tensors, check_tensors, read_config, read_tensors, weights_file

FAMILIES: tuple[ModuleType, ...] = (native, openclip, transformers, dinov3, dinov2, deit3, mae, dino, timm)
"""Each has `matches` and `read`, and is asked in this order: the first that knows the names reads them."""

SHAPELESS = {
    "num_heads", "activation", "position_antialias", "position_offset", "rope_base", "norm_eps", "drop_path",
    "drop_path_schedule", "stochastic_depth", "pool", "init", "register_std",
}  # fmt: skip
"""Fields of a config that change no tensor."""
INSTEAD = {
    "image_size": "load it, then model.set_input_size(size)",
    "num_classes": "load it, then model.reset_classifier(n)",
    "registers": 'give registers=n, new_registers="init"',
}
HEADS_IN_TRAINING = ("head.", "dino_head.", "ibot_head.")


def read_model(
    path: Path,
    *,
    registers: int | None = None,
    new_registers: str | None = None,
    given: Mapping[str, object] | None = None,
) -> VisionTransformer:
    """Read a model from a weights file, or from a folder with one.

    Args:
        path: the file or folder; `config.json`, `preprocessor_config.json` and `open_clip_config.json` beside the
            weights are read too.
        registers: how many register tokens the model shall have; as many as its weights, if left out.
        new_registers: "init" adds random registers to weights that have fewer.
        given: fields of the config that change no tensor, such as `drop_path` or `position_antialias`.

    Returns:
        The model in evaluation mode on the CPU, in float32.

    Raises:
        InputError: nothing there, an unknown family, a tensor that is missing, unexpected, misshapen or not finite,
            or a field that cannot be given. A model is never loaded in part.
    """
    check_given(given or {})
    file = weights_file(path)
    weights = describe(file, given or {})
    weights = with_registers(weights, file, registers, new_registers)
    model = build(weights, file)
    check_tensors(model.state_dict(), weights.tensors, file, weights.origins)
    own = {name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in weights.tensors.items()}
    model.load_state_dict(own, assign=True)
    model.source = str(path)
    return model.eval()


def build(weights: Weights, file: Path) -> VisionTransformer:
    """The model without values; nothing larger than its tensors.

    Raises:
        InputError: the config describes no model, or another one than the tensors.
    """
    config = weights.config
    if config.depth > len(weights.tensors):
        raise InputError(f"{file}: depth={config.depth} in its config, with {len(weights.tensors)} tensors; mend it")
    try:
        with torch.device("meta"):
            return VisionTransformer(config, weights.preprocess)
    except (InputError, RuntimeError, TypeError, OverflowError) as error:  # torch's for sizes beyond any number it has
        reason = str(error).partition("\n")[0]
        raise InputError(f"{file}: its config describes no model ({reason}); mend config.json") from None


def check_given(given: Mapping[str, object]) -> None:
    """Refuse fields that the weights fix.

    Raises:
        InputError: an unknown field, or one that changes tensors.
    """
    known = set(field_names(ViTConfig))
    for name, value in given.items():
        if name not in known:
            raise InputError(f"{name}={value!r}: unknown option{nearest(name, sorted(SHAPELESS))}")
        if name not in SHAPELESS:
            advice = INSTEAD.get(name, f"leave it out (free are {', '.join(sorted(SHAPELESS))})")
            raise InputError(f"{name}={value!r}: the weights fix it, as it changes the shape of tensors; {advice}")


def describe(file: Path, given: Mapping[str, object]) -> Weights:
    """Find the family of a checkpoint and let it describe the model.

    Raises:
        InputError: no family knows the names, or the one that does cannot read them.
    """
    folder = file.parent
    checkpoint = Checkpoint(
        file,
        backbone(read_tensors(file)),
        config=read_config(folder / "config.json"),
        processor=read_config(folder / "preprocessor_config.json"),
        open_clip=read_config(folder / "open_clip_config.json"),
        given=given,
    )
    for family in FAMILIES:
        if family.matches(checkpoint):
            return family.read(checkpoint)
    some = ", ".join(sorted(checkpoint.tensors)[:3]) or "none"
    raise InputError(
        f'{file}: its tensors ({some}, ...) are neither in our format (config.json with "library": "vitreg") nor in '
        "the names of DINO, DINOv2, DINOv3, DeiT-III, MAE, timm, transformers or open_clip; give a ViT of one of these"
    )


def backbone(tensors: Tensors) -> Tensors:
    """Tensors without the wrappers of distributed training, and of DINO's and DINOv2's networks the backbone."""
    for wrapper in ("_orig_mod.", "module.", "_orig_mod."):  # a compiled model, a distributed one, or both
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    if not any(name.startswith("backbone.") for name in tensors):
        return tensors
    return {
        name.removeprefix("backbone."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(HEADS_IN_TRAINING)
    }


def with_registers(weights: Weights, file: Path, registers: int | None, new: str | None) -> Weights:
    """Add the registers asked for.

    Raises:
        InputError: there are more than asked for, or fewer and nobody said that new ones shall start at random.
    """
    there = weights.config.registers
    if new not in (None, "init"):
        raise InputError(f'new_registers={new!r}: only "init" is known, which starts them at random')
    if registers is None and new is not None:
        raise InputError(f'new_registers="init" without a number; {file} has {there}; give registers=n as well')
    if registers is None or registers == there:
        return weights
    if registers < there:
        raise InputError(
            f"registers={registers}: {file} has {there}, and its other weights rely on them; leave registers out"
        )
    if new != "init":
        raise InputError(
            f"registers={registers}: {file} has {there}; to add random ones, which need training, "
            'give new_registers="init" as well'
        )
    config = override(weights.config, {"registers": registers})
    added = torch.empty(registers - there, config.embed_dim)
    fill(added, config.register_std or (config.embed_dim**-0.5 if config.init == "clip" else RECIPE_STD["deit3"]))
    warnings.warn(
        f"{file}: {registers - there} registers added with random values. The other weights were trained without "
        "them: all features change and accuracy drops, by much in models that timm's maintainer tried; train the "
        "model before use",
        UserWarning,
        stacklevel=4,
    )
    tokens = torch.cat([weights.tensors["registers.tokens"].float(), added])
    return replace(weights, config=config, tensors={**weights.tensors, "registers.tokens": tokens})
