"""manifest.json: what cached features depend on, in plain values that can be compared."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone
from vitreg_core.precision import Precision
from vitreg_core.weights.files import weights_hash

from vitreg_eval import store
from vitreg_eval.datasets import ImageSet

MANIFEST = "manifest.json"
MEANING = {
    "model": "another model (other weights)",
    "architecture": "a model of the same weights that computes otherwise",
    "data": "other images",
    "images": "another number of images",
    "prepared": "images of another preprocessing",
    "layers": "other layers",
    "norm": "tokens before or after the final norm, unlike what is asked for",
    "parts": "other tokens",
    "dtype": "another number type",
    "precision": "another precision of the arithmetic",
    "records": "other records",
    "shard": "another size of shards",
}
"""What a reader is told where two manifests differ."""


def describe(backbone: Backbone, image_set: ImageSet, precision: Precision, kept: Mapping[str, Any]) -> dict[str, Any]:
    """All that features depend on, in plain values; `kept` says what is kept of each image."""
    assert isinstance(backbone, nn.Module)
    assert image_set.prepared is not None, "an image set whose features are cached says how it was prepared"
    return {
        "model": weights_hash(backbone),
        "architecture": architecture_hash(backbone),
        "data": image_set.data.hash,
        "images": image_set.data.n,
        "prepared": dict(image_set.prepared),
        **kept,
        "precision": precision,
        "shard": store.SHARD,
    }


def architecture_hash(model: nn.Module) -> str:
    """SHA-256 over what a model does with its weights: its modules, its config, and buffers that are not saved."""
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(model)).encode())
    digest.update(repr(getattr(model, "config", None)).encode())
    for name, buffer in sorted(model.named_buffers()):
        digest.update(f"{name} {buffer.dtype} {tuple(buffer.shape)}".encode())
        digest.update(buffer.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def store_folder(cache: Path, name: str, manifest: Mapping[str, Any]) -> Path:
    """Where features are kept: in a sub-folder of a cache that is theirs alone, or in the folder itself if it is one.

    A folder that holds a manifest is one; `claim` then refuses features of another model.
    """
    if (cache / MANIFEST).exists():
        return cache
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    return cache / f"{re.sub('[^A-Za-z0-9._-]+', '_', name)}-{key}"


def claim(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make a folder what the manifest says, if it is not yet.

    Raises:
        InputError: the folder holds features of something else, or cannot be written.
    """
    path = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            store.write_whole(path, json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another folder") from None
    there = store.read_json(path)
    if there.keys().isdisjoint(manifest):
        raise InputError(f"{path}: not that of features; give another folder")
    for name in [*manifest, *there]:
        if there.get(name) != manifest.get(name):
            raise InputError(
                f"{folder}: holds features of {MEANING.get(name, name)}: {name} is {short(there.get(name))} "
                f"there, {short(manifest.get(name))} here; give another folder, or delete this one"
            )


def short(value: object) -> str:
    """A value for a message."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."
