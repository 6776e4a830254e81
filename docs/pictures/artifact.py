"""Draw artifact.png: what outliers do to a ViT-Ti on drawn scenes, and test-time registers after them.

python docs/pictures/artifact.py [SOURCE]
"""

import sys
from pathlib import Path

import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor
from vitreg_core import Backbone, VisionTransformer, load_model
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.outliers import patch_norms
from vitreg_core.test_time import find_register_neurons, with_test_time_registers

SOURCE = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
SHOWN = 3


@torch.inference_mode()
def maps(model: Backbone, images: Tensor) -> list[Tensor]:
    """Norms of the patches after the last block, and what the class token attends to there, each `b rows cols`."""
    rows = images.shape[-1] // model.patch_size
    attention = model.attention(images, -1).mean(dim=1)[:, 0, model.num_prefix_tokens :]
    return [
        rearrange(found, "b (rows cols) -> b rows cols", rows=rows)
        for found in (patch_norms(model, images)[-1], attention)
    ]


def draw(model: VisionTransformer) -> Figure:
    """A row per scene: the scene, norms before and after, attention before and after."""
    scenes = draw_scenes(128, seed=0, image_size=model.preprocess.config.image_size).image
    images = model.preprocess.normalize(scenes)
    neurons = find_register_neurons(model, images)
    before, after = maps(model, images[:SHOWN]), maps(with_test_time_registers(model, neurons), images[:SHOWN])
    titles = (
        "scene",
        "patch norms",
        "with test-time registers",
        "attention of the class token",
        "with test-time registers",
    )
    columns = (before[0], after[0], before[1], after[1])
    figure = Figure(figsize=(11.5, 6.4), layout="constrained")
    grid = figure.subplots(SHOWN, 5)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    for axes, scene in zip(grid[:, 0], scenes, strict=False):
        axes.imshow(rearrange(scene, "c height width -> height width c"))
    for place, values in enumerate(columns, 1):
        pair = torch.cat(columns[:2] if place < 3 else columns[2:])
        limits = {"vmin": float(pair.min()), "vmax": float(pair.max())}
        for axes, one in zip(grid[:, place], values, strict=True):
            image = axes.imshow(one, cmap="magma", norm="log" if place < 3 else "linear", **limits)
        if place in (2, 4):
            label = "norm, logarithmic" if place == 2 else "share of the attention"
            bar = figure.colorbar(
                image, ax=grid[:, place - 1 : place + 1], location="bottom", aspect=40, shrink=0.8, label=label
            )
            if place == 2:
                bar.set_ticks([20, 50, 100, 200, 500], labels=["20", "50", "100", "200", "500"])
                bar.minorticks_off()
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    model = load_model(sys.argv[1] if len(sys.argv) > 1 else SOURCE).eval()
    draw(model).savefig(Path(__file__).with_suffix(".png"), dpi=80)
