"""Our own format: `model.safetensors` with the names of our modules, and `config.json` with how to build it."""

from pathlib import Path

import torch

from vitreg_core.config import PreprocessConfig, ViTConfig, override, validate
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights.checkpoint import Checkpoint, Weights
from vitreg_core.weights.files import Tensors, write_folder

LIBRARY = "vitreg"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the config is ours, or the names are."""
    return "registers.tokens" in checkpoint.tensors or (
        checkpoint.config.get("library") == LIBRARY and "cls_token" not in checkpoint.tensors
    )


def read(checkpoint: Checkpoint) -> Weights:
    """Describe the model as the config does.

    Raises:
        InputError: the config is missing or does not fit.
    """
    where = str(checkpoint.file.parent / "config.json")
    if checkpoint.config.get("library") != LIBRARY:
        raise InputError(
            f'{checkpoint.file}: in our format, but {where} with "library": "{LIBRARY}" is missing; put it there'
        )
    model, preprocess = (checkpoint.section(checkpoint.config, name) for name in ("model", "preprocess"))
    return Weights(
        override(validate(ViTConfig, model, where), checkpoint.given),
        validate(PreprocessConfig, preprocess, where),
        checkpoint.tensors,
    )


def save(model: VisionTransformer, folder: Path) -> None:
    """Write a model, whole or not at all.

    Raises:
        InputError: the model holds more than its config says, or the folder cannot be written.
    """
    unchanged(model, folder)
    config = {
        "library": LIBRARY,
        "model": model.config.model_dump(mode="json"),
        "preprocess": model.preprocess.config.model_dump(mode="json"),
    }
    write_folder(model.state_dict(), config, folder)


def unchanged(model: VisionTransformer, folder: Path) -> None:
    """Refuse a model that its config no longer describes.

    Raises:
        InputError: it holds other tensors.
    """
    with torch.device("meta"):
        expected = VisionTransformer(model.config).state_dict()
    if shapes(model.state_dict()) != shapes(expected):
        raise InputError(f"{folder}: this model was changed after it was built; save the one it was made from")


def shapes(tensors: Tensors) -> dict[str, torch.Size]:
    """Shape of every tensor."""
    return {name: tensor.shape for name, tensor in tensors.items()}
