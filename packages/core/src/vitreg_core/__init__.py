"""One exact register vision transformer, and the tools to find and remove outlier tokens."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitreg_core.backbones import as_backbone as as_backbone
    from vitreg_core.capturing import capture as capture
    from vitreg_core.config import PreprocessConfig as PreprocessConfig
    from vitreg_core.config import ViTConfig as ViTConfig
    from vitreg_core.cost import ModelCost as ModelCost
    from vitreg_core.cost import model_cost as model_cost
    from vitreg_core.cost import register_overhead as register_overhead
    from vitreg_core.deploy import export_onnx as export_onnx
    from vitreg_core.errors import InputError as InputError
    from vitreg_core.features import Backbone as Backbone
    from vitreg_core.features import Features as Features
    from vitreg_core.presets import create_model as create_model
    from vitreg_core.presets import list_models as list_models
    from vitreg_core.vit import VisionTransformer as VisionTransformer
    from vitreg_core.weights import load_model as load_model
    from vitreg_core.weights import save_model as save_model

HOMES = {
    "as_backbone": "backbones",
    "capture": "capturing",
    "PreprocessConfig": "config",
    "ViTConfig": "config",
    "ModelCost": "cost",
    "model_cost": "cost",
    "register_overhead": "cost",
    "export_onnx": "deploy",
    "InputError": "errors",
    "Backbone": "features",
    "Features": "features",
    "create_model": "presets",
    "list_models": "presets",
    "VisionTransformer": "vit",
    "load_model": "weights",
    "save_model": "weights",
}
__all__ = list(HOMES)


def __getattr__(name: str) -> object:
    """Import a public name at its first use, so that configs and `--help` need no torch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
