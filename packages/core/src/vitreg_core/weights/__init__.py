"""Load and save models: find the family of a checkpoint, map its names, check every tensor."""

from pathlib import Path

from vitreg_core.config import nearest
from vitreg_core.errors import InputError
from vitreg_core.presets import create_model, list_models
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights import native, timm
from vitreg_core.weights.files import read_config, read_tensors, weights_file


def load_model(source: str | Path) -> VisionTransformer:
    """Load a model, or build a preset with random weights.

    Args:
        source: a folder that `save_model` or timm wrote, a run folder, a weights file with its `config.json` beside
            it, or a preset such as `vit_s16_reg4`.

    Returns:
        The model in evaluation mode on the CPU; `model.source` says what was loaded.

    Raises:
        InputError: nothing there, an unknown family, or a tensor that is missing, unexpected, misshapen or not finite.
            A model is never loaded in part.
    """
    path = Path(source)
    if not path.exists():
        return preset(str(source))
    file = weights_file(path)
    config = read_config(file.parent / "config.json")
    family = native if native.matches(config) else timm
    model = family.load(file, config, read_tensors(file))
    model.source = str(source)
    return model.eval()


def save_model(model: VisionTransformer, folder: str | Path) -> None:
    """Write a model as `model.safetensors` and `config.json`, whole or not at all.

    Raises:
        InputError: the model holds more than its config says (test-time registers), or the folder cannot be written.
    """
    native.save(model, Path(folder))


def preset(name: str) -> VisionTransformer:
    """Build a preset, or say what a source may be."""
    if name.partition(":")[0] in {"hub", "timm", "transformers", "open_clip"}:
        raise InputError(f"model source {name!r}: this version reads files and presets only; give a folder of weights")
    if not name.startswith("vit_"):
        hint = nearest(name, list_models())
        raise InputError(
            f"model source {name!r}: no such file or folder, and no preset{hint}; give a folder with model.safetensors "
            "and config.json, or a preset such as vit_s16_reg4"
        )
    model = create_model(name).eval()
    model.source = f"{name} (random weights)"
    return model
