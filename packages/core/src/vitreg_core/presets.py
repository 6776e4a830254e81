"""Named models: `vit_<size><patch>`, with `_regN` for N registers."""

import re
from typing import Any

from vitreg_core.config import ViTConfig, nearest, override
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer

SIZES: dict[str, dict[str, Any]] = {
    "ti": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "h": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "g": {"embed_dim": 1536, "depth": 40, "num_heads": 24, "feed_forward": "swiglu"},
}
PATCH_SIZES = (8, 14, 16, 32)


def list_models() -> list[str]:
    """List the presets without registers and with four; any other number works as well (`vit_s16_reg8`)."""
    return [f"vit_{size}{patch}{suffix}" for size in SIZES for patch in PATCH_SIZES for suffix in ("", "_reg4")]


def preset_config(preset: str) -> ViTConfig:
    """Shapes of a preset: LayerScale 1e-4 and positions on the patches alone, as in DeiT-III.

    Raises:
        InputError: no such preset; names the nearest one.
    """
    match = re.fullmatch(r"vit_([a-z]+)(\d+)(?:_reg(\d+))?", preset)
    if match is None or match[1] not in SIZES or int(match[2]) not in PATCH_SIZES:
        known = ", ".join(SIZES), ", ".join(map(str, PATCH_SIZES))
        raise InputError(
            f"unknown preset {preset!r}{nearest(preset, list_models())} "
            f"(presets are vit_<size><patch>[_regN] with size {known[0]} and patch {known[1]})"
        )
    return ViTConfig(patch_size=int(match[2]), registers=int(match[3] or 0), layer_scale=1e-4, **SIZES[match[1]])


def create_model(preset: str, **overrides: object) -> VisionTransformer:
    """Build a preset with random weights.

    Args:
        preset: a name of `list_models()`, or one with another number of registers.
        overrides: fields of `ViTConfig`, such as `image_size=518` or `num_classes=1000`.

    Raises:
        InputError: unknown preset or field (with the nearest name), or a value that does not fit.
    """
    return VisionTransformer(override(preset_config(preset), overrides), source=preset)
