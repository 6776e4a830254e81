"""Runs of DINOv2."""

from vitreg_core.config import ViTConfig

from vitreg_recipes.dinov2.config import (
    CropsConfig,
    DinoConfig,
    DinoHeadConfig,
    DinoLossConfig,
    DinoOptimConfig,
    TeacherConfig,
)


def dinov2_scenes() -> DinoConfig:
    """A small ViT on drawn scenes, without labels: minutes on two CPU cores.

    Published: none.
    Measured: not yet.
    Cost: not yet.
    """
    return DinoConfig(
        model=ViTConfig(
            image_size=64,
            patch_size=8,
            embed_dim=96,
            depth=4,
            num_heads=3,
            layer_scale=1e-1,
            mask_token=True,
            init="dinov2",
        ),
        data=CropsConfig(path="scenes", batch_size=32, local_size=32, local_crops=4),
        head=DinoHeadConfig(prototypes=512, hidden=256, bottleneck=64),
        loss=DinoLossConfig(koleo=0.1),
        optim=DinoOptimConfig(lr=5e-3, warmup_steps=60, freeze_last_steps=30, layer_decay=1.0),
        teacher=TeacherConfig(momentum=0.98, temperature_steps=300),
        steps=1000,
        save_every=250,
    )
