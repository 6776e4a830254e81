"""Small models to edit by test-time registers, and what their tests share."""

import pytest
import torch
from vitreg_core import (
    VisionTransformer,
    ViTConfig,
    create_model,
)
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_core.test_time import (
    Neuron,
)

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, registers=1, layer_scale=0.5)
NEURONS = [Neuron(1, 5), Neuron(1, 9), Neuron(2, 0)]
KINDS = {
    "plain": {},
    "swiglu": {"feed_forward": "swiglu"},
    "rope": {"position": "rope", "qk_norm": True, "activation": "quick_gelu"},
    "no class token": {"class_token": False, "pool": "avg", "registers": 0},
}


def model(**changes: object) -> VisionTransformer:
    """A small model with weights that matter."""
    built = VisionTransformer(override(CONFIG, {"num_classes": 4, **changes})).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


@torch.no_grad()
def scene_model(depth: int, **changes: object) -> VisionTransformer:
    """A random model whose patch norms are even, as those of trained models are."""
    clean = create_model("vit_ti8", image_size=64, depth=depth, embed_dim=96, layer_scale=0.1, **changes).eval()
    clean.positions.patches.mul_(20)
    return clean


def one_line(error: pytest.ExceptionInfo[InputError]) -> bool:
    return "\n" not in str(error.value)
