"""Models of timm, transformers and open_clip behind the `Backbone` protocol."""

import importlib

from torch import nn

from vitreg_core.backbones.adapter import Adapter
from vitreg_core.capturing import refuse_compiled
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import Preprocess
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer

ADAPTERS = {
    "timm": ("TimmBackbone", ("VisionTransformer", "Eva")),
    "transformers": (
        "TransformersBackbone",
        ("ViTModel", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel", "CLIPVisionModel"),
    ),
    "open_clip": ("OpenClipBackbone", ("VisionTransformer",)),
}
"""By library: its adapter in the module of that name, and the classes of the library that it takes."""

TOWERS = {
    "transformers": {
        "ViTForImageClassification": "vit",
        "Dinov2ForImageClassification": "dinov2",
        "Dinov2WithRegistersForImageClassification": "dinov2_with_registers",
        "CLIPVisionModelWithProjection": "vision_model",
        "CLIPModel": "vision_model",
    },
    "open_clip": {"CLIP": "visual", "CustomTextCLIP": "visual", "CoCa": "visual"},
}
"""By library and class: where a model with a head or a text tower keeps its image tower."""


def as_backbone(model: nn.Module, preprocess: PreprocessConfig | None = None) -> VisionTransformer | Adapter:
    """Put a model of another library behind the `Backbone` protocol; it computes with its own code and weights.

    All is read off the library's own forward pass, in the precision of its weights; no library is imported for it. Of
    images whose size the patch does not divide, the pixels beyond the last whole patch are dropped. Positions are
    resized by the library itself: transformers always does; timm with `dynamic_img_size`; open_clip never.

    Args:
        model: a timm VisionTransformer or Eva (DINOv3), a transformers ViT, Dinov2, Dinov2WithRegisters, DINOv3ViT or
            CLIP vision model, an open_clip image tower, or a model with a head or text tower around one. It is neither
            copied nor changed: put it into evaluation mode for features. Our own model comes back as it is.
        preprocess: what the checkpoint expects of images. timm and open_clip models know it; those of transformers do
            not, and say so where it is asked for.

    Raises:
        InputError: a class that is not supported, or a compiled model.
    """
    refuse_compiled(model)
    if isinstance(model, VisionTransformer | Adapter):
        if preprocess is not None:
            raise InputError(
                f"this {type(model).__name__} has its own preprocessing; call as_backbone(model) without one"
            )
        return model
    known = None if preprocess is None else Preprocess(preprocess)
    for library, name in lineage(model):
        if name in TOWERS.get(library, {}):
            return as_backbone(getattr(model, TOWERS[library][name]), preprocess)
        if name in ADAPTERS[library][1]:
            module = importlib.import_module(f"{__name__}.{library}")
            return getattr(module, ADAPTERS[library][0])(model, known)
    supported = "; ".join(f"{library}: {', '.join(names)}" for library, (_, names) in ADAPTERS.items())
    raise InputError(
        f"{type(model).__module__}.{type(model).__name__} is not supported as a backbone; give one of {supported}"
    )


def lineage(model: nn.Module) -> list[tuple[str, str]]:
    """Library and name of a model's class and of those it derives from, as far as they belong to a known library."""
    classes = ((cls.__module__.partition(".")[0], cls.__name__) for cls in type(model).__mro__)
    return [(library, name) for library, name in classes if library in ADAPTERS]
