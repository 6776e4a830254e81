"""Weights files: reading, checking and writing tensors without running anything they hold."""

import hashlib
import json
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitreg_core.errors import InputError

Tensors = dict[str, Tensor]


def weights_file(path: Path) -> Path:
    """The weights file of a source that exists.

    Raises:
        InputError: a folder without one.
    """
    if path.is_file():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise InputError(
        f"{path}: no model.safetensors in it; give a model folder, a finished run folder, or "
        "a folder checkpoints/step_* of an unfinished run"
    )


def read_config(path: Path) -> dict[str, Any]:
    """The config beside the weights; empty where there is none.

    Raises:
        InputError: not JSON.
    """
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); write it again or remove it") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a {type(config).__name__}, not an object; write it again or remove it")
    return config


def read_tensors(path: Path) -> Tensors:
    """All tensors of a .safetensors, .pth, .pt or .bin file.

    Raises:
        InputError: the file is damaged, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a readable weights file ({reason}); fetch or write it again") from None
    tensors = content.get("model", content.get("state_dict", content)) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path}: holds something other than named tensors; give a file of weights")
    return tensors


def load_checked(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put tensors into a model after every one has been checked.

    Raises:
        InputError: a tensor is missing, unexpected, misshapen, not floating or not finite; the model is left as it was.
    """
    expected = model.state_dict()
    for name in expected.keys() - tensors.keys():
        raise InputError(f"{path}: tensor {name} of shape {shape(expected[name])} is missing; nothing was loaded")
    for name in tensors.keys() - expected.keys():
        raise InputError(f"{path}: unexpected tensor {name} of shape {shape(tensors[name])}; nothing was loaded")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            wanted = shape(expected[name])
            raise InputError(f"{path}: tensor {name} has shape {shape(tensor)}, not {wanted}; nothing was loaded")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise InputError(f"{path}: tensor {name} holds values that are not finite numbers; nothing was loaded")
    model.load_state_dict(dict(tensors))


def write_folder(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Write `model.safetensors` and `config.json`; each file appears whole or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(temporary, "weights"))
            Path(temporary, "config").write_text(json.dumps(config, indent=2) + "\n")
            Path(temporary, "config").replace(folder / "config.json")
            Path(temporary, "weights").replace(folder / "model.safetensors")
    except OSError as error:
        raise InputError(f"{folder}: cannot write the model ({error}); give another folder") from None


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names and values of all tensors, the same however they were stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape for a message."""
    return tuple(tensor.shape)
