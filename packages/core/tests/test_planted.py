"""Planted artifacts: in the background, by plain MLPs alone."""

import pytest
import torch
from edits import CONFIG, scene_model
from einops import rearrange
from vitreg_core import (
    VisionTransformer,
)
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError
from vitreg_core.outliers import find_outliers, patch_norms
from vitreg_core.planted import plant_register_neurons


@torch.no_grad()
def test_planted_outliers_sit_in_the_background() -> None:
    scenes, clean = draw_scenes(96, seed=3), scene_model(depth=4)
    images = clean.preprocess.normalize(scenes.image)
    planted, _ = plant_register_neurons(clean, images, layer=2)
    found = find_outliers(patch_norms(planted, images)[-1])
    background = (
        rearrange(scenes.mask == 0, "b (rows y) (cols x) -> b (rows cols) (y x)", y=8, x=8).float().mean(dim=-1)
    )
    assert background.mean() < 0.8
    assert background[found.mask].mean() > 0.95


def test_planting_needs_a_plain_mlp() -> None:
    gated = VisionTransformer(CONFIG.model_copy(update={"feed_forward": "swiglu"}))
    with pytest.raises(InputError, match="has a SwiGLU; plant in a model with plain MLPs"):
        plant_register_neurons(gated, torch.randn(4, 3, 32, 32), layer=0)
