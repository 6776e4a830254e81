"""Our own format: `model.safetensors` with the names of our modules, and `config.json` with how to build it."""

from pathlib import Path
from typing import Any

import torch

from vitreg_core.config import PreprocessConfig, ViTConfig, validate
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights.files import Tensors, load_checked, write_folder

LIBRARY = "vitreg"


def matches(config: dict[str, Any]) -> bool:
    """Whether a config is ours."""
    return config.get("library") == LIBRARY


def load(file: Path, config: dict[str, Any], tensors: Tensors) -> VisionTransformer:
    """Build the model that the config describes and fill it.

    Raises:
        InputError: the config or a tensor does not fit.
    """
    where = str(file.parent / "config.json")
    model = VisionTransformer(
        validate(ViTConfig, config.get("model", {}), where),
        validate(PreprocessConfig, config.get("preprocess", {}), where),
    )
    load_checked(model, tensors, file)
    return model


def save(model: VisionTransformer, folder: Path) -> None:
    """Write a model, whole or not at all.

    Raises:
        InputError: the model holds more than its config says, or the folder cannot be written.
    """
    tensors = model.state_dict()
    with torch.device("meta"):
        expected = VisionTransformer(model.config).state_dict()
    if {name: tensor.shape for name, tensor in tensors.items()} != {n: t.shape for n, t in expected.items()}:
        raise InputError(f"{folder}: this model was changed after it was built; save the one it was made from")
    config = {
        "library": LIBRARY,
        "model": model.config.model_dump(mode="json"),
        "preprocess": model.preprocess.config.model_dump(mode="json"),
    }
    write_folder(tensors, config, folder)
