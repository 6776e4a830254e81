"""What is kept of the tokens that a model gives."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone, Features, block_index
from vitreg_core.precision import Precision, use_precision

PARTS = ("cls", "registers", "patches", "mean_patch")


@dataclass(frozen=True)
class Wanted:
    """What to keep of every image."""

    layers: tuple[int, ...] = (-1,)
    """Blocks, from 0; -1 is the last."""
    norm: bool = True
    """Whether the final norm is applied, to every layer."""
    parts: tuple[str, ...] = ("cls",)
    """Any of cls, registers, patches and mean_patch, the mean of the patch tokens."""
    dtype: torch.dtype = torch.float32
    """float32 or float16."""

    def record(self, backbone: Backbone) -> dict[str, Any]:
        """In plain values."""
        return {
            "layers": [block_index(layer, backbone.depth) for layer in self.layers],
            "norm": self.norm,
            "parts": sorted(self.parts),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def check_wanted(backbone: Backbone, wanted: Wanted) -> None:
    """Refuse tokens and layers that the model does not have.

    Raises:
        InputError: names them, and those there are.
    """
    if unknown := set(wanted.parts) - set(PARTS):
        raise InputError(f"tokens {', '.join(sorted(unknown))}; give some of {', '.join(PARTS)}")
    if "cls" in wanted.parts and "cls" not in backbone.prefix:
        raise no_class_token()
    for layer in wanted.layers:
        block_index(layer, backbone.depth)


def no_class_token() -> InputError:
    """What the user is told of a model without class token."""
    return InputError("this model has no class token, which the task reads; give a model that has one")


@torch.no_grad()
def run(
    backbone: Backbone, images: Float[Tensor, "b 3 height width"], precision: Precision, wanted: Wanted
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Wanted tokens `b layers ...` by name, where and as the model computes them, and the grid of the patches."""
    images = images.to(backbone.device, non_blocking=True)
    with use_precision(precision, backbone.device):
        if wanted.layers == (-1,) and wanted.norm:
            layers = [backbone.features(images)]
        else:
            layers = backbone.intermediate(images, wanted.layers, norm=wanted.norm)
    tokens = {part: torch.stack([pick(layer, part) for layer in layers], dim=1) for part in wanted.parts}
    return tokens, layers[0].grid


def pick(features: Features, part: str) -> Float[Tensor, "b ..."]:
    """One kind of token."""
    if part == "mean_patch":
        return features.patches.float().mean(dim=1)
    found = getattr(features, part)
    assert isinstance(found, Tensor)
    return found


def checked(name: str, values: Float[Tensor, "b ..."], dtype: torch.dtype, start: int) -> Float[Tensor, "b ..."]:
    """Tokens of a batch on the CPU, in the number type that is kept.

    Raises:
        InputError: some are not finite, or beyond what the type holds; names the images, the first being `start`.
    """
    kept = values.to(dtype)
    if not bool(kept.isfinite().all()):
        where = f"images {start} to {start + len(values) - 1}"
        if bool(values.isfinite().all()):
            raise InputError(f"{where}: {name} up to {values.abs().max():.4g}, float16 ends at 65504; use float32")
        raise InputError(f"{where}: {name} of the model are not finite numbers; check its weights and precision")
    return kept.cpu()
