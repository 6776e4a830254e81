"""Any model source as a backbone: in our own model where it can hold the weights, else in the class of its library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vitreg_core.backbones import as_backbone
from vitreg_core.backbones.adapter import Adapter
from vitreg_core.config import PreprocessConfig
from vitreg_core.denoise import Denoised
from vitreg_core.errors import InputError
from vitreg_core.extras import require
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights import load_model
from vitreg_core.weights.checkpoint import Checkpoint
from vitreg_core.weights.files import read_config, weights_file
from vitreg_core.weights.sources import FETCHERS, locate
from vitreg_core.weights.transformers import preprocess

Model = VisionTransformer | Adapter | Denoised
"""Every `Backbone` that a source or a remedy can give; all are modules, and `source` names where they come from."""


def open_model(source: str) -> Model:
    """Open a model of any library, in evaluation mode on the CPU.

    Args:
        source: what `vitreg_core.load_model` takes. Weights that our model cannot hold (other blocks, another pooling)
            are put into the class of the library whose config file lies beside them, behind `as_backbone`.

    Raises:
        InputError: nothing there, an extra is not installed, or neither our model nor the library's can hold it.
    """
    kind, _, name = source.partition(":")
    remote = kind in FETCHERS and bool(name) and not Path(source).exists()
    where = locate(source) if remote else Path(source)
    try:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # so that the random weights of a preset are the same every time
            model: Model = load_model(where if remote else source)
    except InputError as error:
        if not where.exists():
            raise
        model = open_foreign(where, error)
    if where.exists():  # of a preset, the source says that its weights are random
        model.source = source
    return model


def open_foreign(where: Path, reason: InputError) -> Adapter:
    """The class of another library around weights that ours cannot hold.

    Raises:
        InputError: no config beside the weights names a library (gives our reason), or the library cannot build it.
    """
    folder = weights_file(where).parent
    config = read_config(folder / "config.json")
    build = builder(folder, config)
    if build is None:
        raise reason
    try:
        model, images = build(folder, config)
    except InputError:
        raise
    except Exception as error:  # libraries fail on weights in ways that nobody lists
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{reason}; its own library cannot build it either ({said})") from None
    backbone = as_backbone(model.eval(), images)
    assert isinstance(backbone, Adapter)
    return backbone


Build = Callable[[Path, dict[str, Any]], tuple[nn.Module, PreprocessConfig | None]]


def builder(folder: Path, config: dict[str, Any]) -> Build | None:
    """How to build what the config files of a folder describe."""
    if (folder / "open_clip_config.json").is_file():
        return build_open_clip
    if "model_type" in config:
        return build_transformers
    return build_timm if "architecture" in config else None


def build_timm(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, None]:
    """A timm model, for any image size where its class can."""
    timm = require("timm", "timm", f"{folder} with architecture={config['architecture']!r}")
    source = f"local-dir:{folder}"
    try:
        return timm.create_model(source, pretrained=True, dynamic_img_size=True), None
    except TypeError:  # a class without that argument
        return timm.create_model(source, pretrained=True), None


def build_transformers(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, PreprocessConfig]:
    """A transformers model without head, and what its image processor does.

    Raises:
        InputError: weights are missing.
    """
    transformers = require("transformers", "transformers", f"{folder} with model_type={config['model_type']!r}")
    model, loaded = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    missing = [name for name in loaded["missing_keys"] if "pooler" not in name]  # which no task reads
    if missing:
        name = type(model).__name__
        raise InputError(f"{folder}: tensor {sorted(missing)[0]} is missing for a {name}; fetch it again")
    size = read_size(model)
    checkpoint = Checkpoint(
        folder / "model.safetensors", {}, config=config, processor=read_config(folder / "preprocessor_config.json")
    )
    return model, preprocess(checkpoint, size)


def read_size(model: Any) -> tuple[int, int]:  # noqa: ANN401 (a class of transformers)
    """Image size that a transformers model was built for."""
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def build_open_clip(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, None]:  # noqa: ARG001 (it has its own)
    """The image tower of an open_clip model."""
    clip = require("open_clip", "open-clip", f"{folder} with open_clip_config.json")
    return clip.create_model(f"local-dir:{folder}"), None
