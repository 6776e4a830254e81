"""Load and save models: find the family of a checkpoint, map its names, check every tensor."""

import re
from pathlib import Path
from typing import Literal

from vitreg_core.config import nearest
from vitreg_core.errors import InputError
from vitreg_core.presets import create_model
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights import native, save
from vitreg_core.weights.families import read_model
from vitreg_core.weights.sources import locate

LAYOUTS = {"vitreg": native.save, "timm": save.save_timm, "dinov2": save.save_dinov2}


def load_model(
    source: str | Path,
    *,
    registers: int | None = None,
    new_registers: str | None = None,
    **overrides: object,
) -> VisionTransformer:
    """Load a model, or build a preset with random weights.

    Args:
        source: a weights file or a folder with one, of any family (docs/architecture.md lists them); a run folder;
            `hub:org/name`, `timm:NAME`, `transformers:ID` or `open_clip:ARCH/TAG`; an official name such as
            `dinov2_vitb14_reg4`; or a preset such as `vit_s16_reg4`.
        registers: how many register tokens the model shall have; as many as its weights, if left out.
        new_registers: "init" adds random registers to weights that have fewer, with a warning: all features change,
            and the model needs training.
        overrides: fields of `ViTConfig` that change no tensor, such as `position_antialias=True` or `drop_path=0.1`;
            for a preset any field.

    Returns:
        The model in evaluation mode on the CPU, in float32; `model.source` says what was loaded.

    Raises:
        InputError: nothing there, an unknown family, or a tensor that is missing, unexpected, misshapen or not finite.
            A model is never loaded in part.
    """
    if not Path(source).exists() and re.fullmatch(r"vit_[a-z]+\d+(_reg\w*)?", str(source)):
        counted = overrides if registers is None else {**overrides, "registers": registers}
        model = create_model(str(source), **counted).eval()
        model.source = f"{source} (random weights)"
        return model
    model = read_model(locate(str(source)), registers=registers, new_registers=new_registers, given=overrides)
    model.source = str(source)
    return model


def save_model(
    model: VisionTransformer, folder: str | Path, *, layout: Literal["vitreg", "timm", "dinov2"] = "vitreg"
) -> None:
    """Write a model into a folder, each file whole or not at all.

    Args:
        model: what to write.
        folder: made where it is missing.
        layout: `vitreg` writes `model.safetensors` and `config.json`; `timm` the same files for
            `timm.create_model("local-dir:FOLDER")` and transformers' `AutoModel`; `dinov2` writes `model.pth` in the
            names of DINOv2's own models. `load_model` reads all three.

    Raises:
        InputError: a model of another library, one that holds other tensors than its config says, or that `layout`
            cannot hold (names the field; test-time registers fit `vitreg` alone), or the folder cannot be written.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}{nearest(layout, LAYOUTS)}")
    save.refuse_foreign(model)
    LAYOUTS[layout](model, Path(folder))
