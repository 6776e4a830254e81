"""Runs about registers: the study of small models, registers that share one training, and what triggers outliers.

Any other run has registers too, by its name: `deit3_b16_reg4` is `deit3_b16` with four.
"""

from vitreg_core.config import ViTConfig, override

from vitreg_recipes.config import DataConfig, LossConfig, MixConfig, OptimConfig, TrainConfig
from vitreg_recipes.runs import deit3

VARIANTS = {
    "deit3_scenes_reg4": "Measured: k-NN 0.82, head 0.77 of 2048 other scenes, seed 0.",
    "deit3_b16_in22k_reg4": "Published: linear probes 84.7 % ImageNet-1k, 39.1 mIoU ADE20k, 0.512 rmse NYUd; LOST 27.1 "
    "on VOC07 (registers paper, tables 2a, 3).",
    "deit3_s16_study_reg2": "Published: 80.96 %; LOST 15.49 on VOC07 (study, table 1).",
    "deit3_s16_study_reg4": "Published: 80.81 %; LOST 17.92 on VOC07 (study, table 1).",
    "deit3_s16_study_reg8": "Published: 81.04 %; LOST 18.03 on VOC07 (study, table 1).",
    "deit3_s16_study_reg16": "Published: 81.07 %; LOST 19.01 on VOC07 (study, table 1).",
    "dinov2_l14_in22k_reg1": "Published: plotted only (registers paper, Fig. 8).",
    "dinov2_l14_in22k_reg2": "Published: plotted only (registers paper, Fig. 8).",
    "dinov2_l14_in22k_reg4": "Published: linear 84.8 %, ADE20k 47.9 mIoU, NYUd 0.366 rmse (registers paper, table 2a); "
    "LOST 55.4 on VOC07 (table 3).",
    "dinov2_l14_in22k_reg8": "Published: plotted only (registers paper, Fig. 8).",
    "dinov2_l14_in22k_reg16": "Published: plotted only (registers paper, Fig. 8).",
    "dinov2_scenes_reg4": "Measured: k-NN 0.508 of 1000 other scenes, seed 0.",
    "outliers_s16_300_reg4": "Published: 4.0 outliers of 196 patches (SAGA log, 2 runs).",
}
"""What is known of runs with `_regN` behind their name; those that are listed."""


def deit3_s16_study() -> TrainConfig:
    """ViT-S/16 of the study of small models: deit3_s16 at batch 1024.

    Published: 81.05 %; LOST 15.13 on VOC07 (study, table 1).
    Measured: not yet.
    Cost: 1.02e9 images, 2.83e19 FLOPs; 264 A100 hours (study, appendix E).
    """
    return override(deit3.deit3_s16(), {"data.batch_size": 1024, "snapshot_every": 12510, "norms_every": 1251})


def deit3_s16_elastic() -> TrainConfig:
    """ViT-S/16 of deit3_s16 for every register count from 0 to 16.

    Published: none.
    Measured: not yet.
    Cost: 1.02e9 images, 2.94e19 FLOPs, with 8 registers on average.
    """
    return override(deit3.deit3_s16(), {"model.registers": 16, "elastic.sample": True})


def deit3_scenes_elastic() -> TrainConfig:
    """The small ViT of deit3_scenes for every register count from 0 to 8.

    Published: none.
    Measured: not yet.
    Cost: that of deit3_scenes.
    """
    return override(deit3.deit3_scenes(), {"model.registers": 8, "elastic.sample": True})


def deit3_scenes_diverse() -> TrainConfig:
    """The small ViT of deit3_scenes with four registers that are to attend to different places.

    Published: none.
    Measured: not yet.
    Cost: that of deit3_scenes, and the attention maps of the registers.
    """
    return override(deit3.deit3_scenes(), {"model.registers": 4, "elastic.diversity": 0.1})


def outliers_s16() -> TrainConfig:
    """Outliers, what triggers them: ViT-S/16 on ImageNet-1k for 100 epochs, mixing, AdamW, no LayerScale.

    Learning rate, decay, augmentation and mixing are those of the SAGA log; batch, warm-up and smoothing DeiT's.

    Published: 11.7 outliers of 196 patches above median + 5 MAD (SAGA log).
    Measured: not yet.
    Cost: 1.28e8 images, 3.53e18 FLOPs.
    """
    return TrainConfig(
        model=ViTConfig(),
        optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.05, schedule="epochs", warmup_epochs=5),
        data=DataConfig(path="imagenet", batch_size=1024, augment="rand_augment", workers=10),
        mix=MixConfig(mixup=0.8, cutmix=1.0),
        loss=LossConfig(name="ce", smoothing=0.1),
        epochs=100,
        precision="bf16",
        snapshot_every=12510,
        norms_every=1251,
    )


def outliers_s16_nomix() -> TrainConfig:
    """Outliers, what triggers them: without mixing.

    Published: 3.1 outliers of 196 patches after 300 epochs (SAGA log, 2 runs).
    Measured: not yet.
    Cost: 1.28e8 images, 3.53e18 FLOPs.
    """
    return override(outliers_s16(), {"mix.mixup": 0.0, "mix.cutmix": 0.0})


def outliers_s16_300() -> TrainConfig:
    """Outliers, what triggers them: three times as long.

    Published: 16.3 outliers of 196 patches (SAGA log, 4 runs).
    Measured: not yet.
    Cost: 3.84e8 images, 1.06e19 FLOPs.
    """
    return override(outliers_s16(), {"epochs": 300})


def outliers_s16_lamb() -> TrainConfig:
    """Outliers, what triggers them: LAMB at DeiT-III's learning rate.

    Published: none.
    Measured: not yet.
    Cost: 1.28e8 images, 3.53e18 FLOPs.
    """
    return override(outliers_s16(), {"optim.name": "lamb", "optim.lr": 4e-3})


def outliers_s16_layerscale() -> TrainConfig:
    """Outliers, what triggers them: with LayerScale.

    Published: 17.5 outliers of 196 patches (SAGA log).
    Measured: not yet.
    Cost: 1.28e8 images, 3.53e18 FLOPs.
    """
    return override(outliers_s16(), {"model.layer_scale": 1e-4})


def outliers_scenes() -> TrainConfig:
    """Outliers, what triggers them: a narrow, deep ViT that must tell relations in drawn scenes.

    Published: none.
    Measured: not yet.
    Cost: 1.23e7 images, 2.69e16 FLOPs.
    """
    return TrainConfig(
        model=ViTConfig(image_size=64, patch_size=8, embed_dim=192, depth=12, num_heads=3),
        optim=OptimConfig(name="adamw", lr=2e-3, weight_decay=0.05, warmup_steps=500),
        data=DataConfig(path="scenes", label="relation", batch_size=1024),
        mix=MixConfig(mixup=0.8, cutmix=1.0),
        loss=LossConfig(name="ce", smoothing=0.1),
        steps=12_000,
        ema=0.999,
        precision="bf16",
        norms_every=250,
        save_every=1000,
    )


GRID = tuple(
    f"{run.__name__}{suffix}"
    for run in (
        outliers_s16,
        outliers_s16_nomix,
        outliers_s16_300,
        outliers_s16_lamb,
        outliers_s16_layerscale,
        outliers_scenes,
    )
    for suffix in ("", "_reg4")
)
"""The ablation: each run differs in one thing from the first."""
