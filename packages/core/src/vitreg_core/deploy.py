"""Models as ONNX files, for runtimes without torch."""

import json
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim

from vitreg_core.errors import InputError
from vitreg_core.extras import require
from vitreg_core.vit import VisionTransformer


class NamedOutputs(nn.Module):
    """What a file computes: the tokens by kind, and the logits of a model with a head."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "b 3 height width"]) -> dict[str, Tensor]:
        """Every output that the model has, by name."""
        tokens = self.model.forward_features(images)
        features = self.model.name_tokens(tokens, self.model.patch_embed.grid(images))
        outputs = {
            "cls": features.cls,
            "registers": features.registers if self.model.num_registers else None,
            "patches": features.patches,
            "logits": None if self.model.head is None else self.model.forward_head(tokens),
        }
        return {name: tensor for name, tensor in outputs.items() if tensor is not None}


def export_onnx(model: VisionTransformer, path: str | Path) -> None:
    """Write a model as one ONNX file for any batch, height and width of images.

    The input is `images` b 3 height width, normalised pixels. Outputs are `cls` b d, `registers` b r d, `patches` b p d
    and `logits` b classes, as far as the model has them; patches of other than the native image size get their
    positions resized as in torch. The metadata hold `source`, `patch_size` and `preprocess` (JSON). Weights of more
    than 2 GB, which is the most that one file holds, stand beside it in a `.data` file.

    Args:
        model: in float32 and in evaluation mode.
        path: of the file; it appears whole or not at all.

    Raises:
        InputError: the extra `export` is not installed, the model is in training mode or in another precision (the
            file would compute something else than the model), or the file cannot be written.
    """
    require("onnx", "export", "export_onnx")
    require("onnxscript", "export", "export_onnx")
    check(model)
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder; give a folder that exists")
    outputs, side = NamedOutputs(model).eval(), 3 * model.patch_size
    images = torch.zeros(2, 3, side, side + model.patch_size, device=model.device)
    program = torch.onnx.export(
        outputs,
        (images,),
        input_names=["images"],
        output_names=list(outputs(images)),
        dynamic_shapes=({0: Dim("batch"), 2: size("height", model), 3: size("width", model)},),
        verbose=False,
    )
    assert program is not None  # without a path it is always returned
    program.model.metadata_props.update(metadata(model))
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            program.save(Path(folder, path.name))
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights first, where they are apart
                file.replace(path.parent / file.name)
    except OSError as error:
        raise InputError(f"{path}: cannot write the model ({error}); give another path") from None


def size(name: str, model: VisionTransformer) -> Dim:
    """A side of the images; torch needs two patches at least, as it takes a side of one for a constant."""
    return Dim(name, min=2 * model.patch_size)


def check(model: VisionTransformer) -> None:
    """Refuse models that a file cannot follow exactly."""
    if model.training:
        raise InputError(f"model {model.source or '(unnamed)'} is in training mode; call model.eval() first")
    dtypes = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if dtypes:
        raise InputError(f"an ONNX file of a model in {dtypes.pop()} would differ from it; call model.float() first")


def metadata(model: VisionTransformer) -> dict[str, str]:
    """What someone needs to know who has the file alone."""
    return {
        "source": model.source,
        "patch_size": str(model.patch_size),
        "preprocess": json.dumps(model.preprocess.config.model_dump(mode="json")),
    }
