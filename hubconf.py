"""Entry points of torch.hub: every preset, with random weights, and `load_model` for everything else."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "packages" / "core" / "src"))

from vitreg_core import VisionTransformer, create_model, list_models
from vitreg_core import load_model as load_model

dependencies = ["einops", "jaxtyping", "numpy", "PIL", "pydantic", "safetensors", "torch", "tqdm"]


def _entry(preset: str) -> Callable[..., VisionTransformer]:
    def create(**overrides: object) -> VisionTransformer:
        return create_model(preset, **overrides)

    create.__doc__ = f"Build {preset} with random weights; keyword arguments are fields of ViTConfig."
    return create


globals().update({name: _entry(name) for name in list_models()})
