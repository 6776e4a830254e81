"""Weights files: reading, checking and writing tensors without running anything they hold."""

import argparse
import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitreg_core.errors import InputError

Tensors = dict[str, Tensor]

NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.pth",
)
"""Names of weights in a folder, best first; any of them may be an index of several files."""
WRAPPERS = ("teacher", "model", "state_dict")
"""Keys under which training checkpoints keep the weights, best first."""


def weights_file(path: Path) -> Path:
    """The weights file of a source that exists.

    Raises:
        InputError: a folder without one.
    """
    if path.is_file():
        return path
    for name in NAMES:
        for file in (path / name, path / f"{name}.index.json"):
            if file.is_file():
                return file
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
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); write it again or remove it") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a {type(config).__name__}, not an object; write it again or remove it")
    return config


def read_tensors(path: Path) -> Tensors:
    """All tensors of a .safetensors, .pth, .pt or .bin file, or of the files that an .index.json lists.

    Of a training checkpoint, those under the key `teacher`, `model` or `state_dict`.

    Raises:
        InputError: the file is damaged, or holds anything but tensors.
    """
    if path.name.endswith(".index.json"):
        return read_shards(path)
    try:
        content = load_file(path) if is_safetensors(path) else read_pickle(path)
    except Exception as error:  # a damaged file makes the readers fail in ways that nobody lists
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a readable weights file ({reason}); fetch or write it again") from None
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        for name, value in content.items()
    ):
        raise InputError(f"{path}: holds something other than named dense tensors; give a file of weights")
    return content


def is_safetensors(path: Path) -> bool:
    """Whether a file is of that format: by its name, or by the JSON that such a file starts with."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def read_pickle(path: Path) -> object:
    """What torch saved, if it is made of tensors and plain values; option lists of training scripts are such too."""
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read is an error anyway
        return torch.load(path, map_location="cpu", weights_only=True)


def read_shards(path: Path) -> Tensors:
    """All tensors of the files that an index lists.

    Raises:
        InputError: the index cannot be read, or a file of it is missing or outside its folder.
    """
    files = read_config(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise InputError(f"{path}: no index of weights files; fetch or write it again")
    tensors: Tensors = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name or not (path.parent / name).is_file():
            raise InputError(f"{path}: lists {name}, which is not beside it; fetch it too")
        tensors |= read_tensors(path.parent / name)
    return tensors


def load_checked(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put tensors into a model after every one has been checked.

    Raises:
        InputError: a tensor is missing, unexpected, misshapen, not floating or not finite; the model is left as it was.
    """
    check_tensors(model.state_dict(), tensors, path, {})
    model.load_state_dict(dict(tensors))


def check_tensors(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path, origins: Mapping[str, str]
) -> None:
    """Check that tensors fit a model.

    Args:
        expected: what the model has.
        tensors: what was read.
        path: of the file, for the messages.
        origins: the name in the file of each, where it is another.

    Raises:
        InputError: a tensor is missing, unexpected, misshapen, not floating or not finite.
    """
    for name in expected.keys() - tensors.keys():
        wanted = shape(expected[name])
        raise InputError(f"{path}: tensor {file_name(name, origins)} of shape {wanted} is missing; nothing was loaded")
    for name in tensors.keys() - expected.keys():
        found = f"{file_name(name, origins)} of shape {shape(tensors[name])}"
        raise InputError(f"{path}: unexpected tensor {found}; nothing was loaded")
    for name, tensor in tensors.items():
        theirs = file_name(name, origins)
        if tensor.shape != expected[name].shape:
            wanted = shape(expected[name])
            raise InputError(f"{path}: tensor {theirs} has shape {shape(tensor)}, not {wanted}; nothing was loaded")
        if not tensor.is_floating_point() or not tensor.to(torch.float32).isfinite().all():
            raise InputError(f"{path}: tensor {theirs} holds values that are not finite numbers; nothing was loaded")


def file_name(name: str, origins: Mapping[str, str]) -> str:
    """The name in the file of a tensor, or, of one that is missing, what other blocks suggest."""
    if name in origins or not name.startswith("blocks."):
        return origins.get(name, name)
    _, index, rest = name.split(".", 2)
    for ours, theirs in origins.items():
        if ours.startswith("blocks.") and ours.split(".", 2)[2] == rest:
            return theirs.replace(f".{ours.split('.', 2)[1]}.", f".{index}.", 1)
    return name


def write_folder(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: Path,
    names: tuple[str, str] = ("model.safetensors", "config.json"),
) -> None:
    """Write weights and config under these names; each file appears whole or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(temporary, "weights"))
            Path(temporary, "config").write_text(json.dumps(config, indent=2) + "\n")
            Path(temporary, "config").replace(folder / names[1])
            Path(temporary, "weights").replace(folder / names[0])
    except (OSError, SafetensorError) as error:  # the second on a full disk
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
