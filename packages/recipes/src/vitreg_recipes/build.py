"""The model of a run: new, or with the weights of another one."""

from vitreg_core.config import ViTConfig, check_shapes, override
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights import load_model

from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data import Data


def build(config: TrainConfig, data: Data) -> VisionTransformer:
    """Build the model, with a head for the classes of the data.

    Raises:
        InputError: shapes that cannot be built, or no such weights.
    """
    source = str(config.out or "a run without a folder")
    if config.init is None:
        shapes = override(config.model, {"num_classes": len(data.classes)})
        return VisionTransformer(shapes, data.preprocess, source=source)
    model = start_from(config.init, config.model, len(data.classes))
    expected = model.preprocess.config
    data.preprocess = override(data.preprocess, {"mean": expected.mean, "std": expected.std})
    model.preprocess.config, model.source = data.preprocess, source
    return model


def start_from(init: str, wanted: ViTConfig, classes: int) -> VisionTransformer:
    """Load a model and fit it to a run: image size, drop path, more registers, and a head for the classes.

    Positions are resized to the grid of the images. A head for as many classes is kept, any other replaced by a random
    one. Registers that the weights lack start at random, with a warning; those that they have are kept.

    Raises:
        InputError: no such weights, fewer registers than they have, or images smaller than one of its patches.
    """
    model = load_model(init, drop_path=wanted.drop_path)
    if 0 < wanted.registers < model.config.registers:
        raise InputError(
            f"model.registers={wanted.registers} with init={init}, whose other weights rely on its "
            f"{model.config.registers}; leave model.registers out"
        )
    if wanted.registers > model.config.registers:
        model = load_model(init, drop_path=wanted.drop_path, registers=wanted.registers, new_registers="init")
    check_shapes(override(model.config, {"image_size": wanted.image_size}))
    if model.config.size != wanted.size:
        model.set_input_size(wanted.image_size)
    if model.config.num_classes != classes:
        model.reset_classifier(classes)
    if model.mask_token is not None:
        model.mask_token.requires_grad_(False)  # noqa: FBT003 (torch's; no image here is masked)
    return model


def resolved(config: TrainConfig, model: VisionTransformer) -> TrainConfig:
    """The config with the shapes that the model has, but for the classes, which the data decide."""
    return override(config, {"model": override(model.config, {"num_classes": 0}).model_dump()})
