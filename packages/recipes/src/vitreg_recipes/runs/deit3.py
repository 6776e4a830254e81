"""Runs of DeiT-III: each row of its published tables, and two small ones that need no more than a laptop.

Sources: README of the official code for the 800 epochs, fine-tunes and ImageNet-22k; table 13 of DeiT III for 90 epochs
of ImageNet-22k; README of naver-ai/rope-vit for 400 epochs. Published values are ImageNet-1k top-1 at crop ratio 1.0.
FLOPs are those of forward and backward pass (3 x `model_cost`), with 1 281 167 or 14 197 122 images per epoch. EMA
weights are kept, as in the official code, but published values are those of the raw weights.
"""

from vitreg_core.config import ViTConfig, override

from vitreg_recipes.config import DataConfig, LossConfig, MixConfig, OptimConfig, TrainConfig

BASE = {"model.embed_dim": 768, "model.num_heads": 12}
LARGE = {"model.embed_dim": 1024, "model.depth": 24, "model.num_heads": 16}
HUGE = {"model.patch_size": 14, "model.embed_dim": 1280, "model.depth": 32, "model.num_heads": 16}
FINE_TUNE = {
    "optim.name": "adamw",
    "optim.lr": 1e-5,  # also the least, so the cosine is flat
    "optim.weight_decay": 0.1,
    "data.batch_size": 512,
    "data.augment": "rand_augment",
    "data.repeats": 1,
    "loss.name": "ce",
    "loss.smoothing": 0.1,
    "epochs": 20,
}
"""Fine-tune to another resolution."""
IN22K = {
    "model.image_size": 224,
    "optim.lr": 1e-3,
    "optim.weight_decay": 0.02,
    "data.path": "imagenet22k",
    "data.augment": "three_simple_crop",
    "data.repeats": 1,
    "mix.mixup": 0.0,
    "loss.name": "ce",
    "loss.smoothing": 0.1,
    "epochs": 240,
}
"""Pre-training on ImageNet-22k."""
TO_IN1K = {"model.image_size": 224, "optim.lr": 3e-4, "data.path": "imagenet", "epochs": 50}
"""From ImageNet-22k to ImageNet-1k: all else as in the pre-training."""


def deit3_scenes() -> TrainConfig:
    """A small ViT on drawn scenes: the DeiT-III signal in a minute and a half on two CPU cores.

    Published: none.
    Measured: k-NN finds the class (1 of 6) of 0.80 of 2048 other scenes, the head of 0.75, seed 0.
    Cost: 35 200 images, 300 to 390 per second on two CPU cores.
    """
    return TrainConfig(
        model=ViTConfig(image_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, layer_scale=1e-4),
        optim=OptimConfig(name="lamb", lr=8e-3, warmup_steps=60),
        data=DataConfig(path="scenes", label="class", batch_size=32),
        mix=MixConfig(mixup=0.8, cutmix=1.0),
        loss=LossConfig(name="bce"),
        steps=1100,
        save_every=250,
    )


def deit3_imagenette() -> TrainConfig:
    """A small ViT on photos of ten classes, such as Imagenette: minutes on two CPU cores.

    AdamW, cross-entropy and a little Mixup: BCE, for which both classes of a mix count as fully there, had hardly begun
    to learn after 13 000 images.

    Published: none.
    Measured: top-1 on 400 validation photos after 1100 training photos: head 0.349, k-NN 0.387, mean of 3 seeds.
    Cost: 19 200 images, 158 per second on one CPU core.
    """
    return TrainConfig(
        model=ViTConfig(image_size=64, patch_size=8, embed_dim=128, depth=4, num_heads=4),
        optim=OptimConfig(name="adamw", lr=1e-3, warmup_steps=60),
        data=DataConfig(path="imagenette", batch_size=32, augment="three"),
        mix=MixConfig(mixup=0.2, cutmix=0.0),
        loss=LossConfig(name="ce"),
        steps=600,
        save_every=200,
    )


def deit3_s16() -> TrainConfig:
    """ViT-S/16 on ImageNet-1k for 800 epochs.

    Published: 81.4 %.
    Measured: not yet.
    Cost: 1.02e9 images, 2.83e19 FLOPs.
    """
    return TrainConfig(
        model=ViTConfig(layer_scale=1e-4, drop_path=0.05, position_antialias=False),
        optim=OptimConfig(name="lamb", lr=4e-3, weight_decay=0.05, schedule="epochs", warmup_epochs=5),
        data=DataConfig(path="imagenet", batch_size=2048, augment="three", repeats=3, workers=10),
        mix=MixConfig(mixup=0.8, cutmix=1.0),
        loss=LossConfig(name="bce"),
        epochs=800,
        ema=0.99996,
        precision="bf16",
    )


def deit3_b16() -> TrainConfig:
    """ViT-B/16 on ImageNet-1k at 192 px for 800 epochs.

    Published: 82.8 % at 192 px.
    Measured: not yet.
    Cost: 1.02e9 images, 7.86e19 FLOPs.
    """
    return override(deit3_s16(), {**BASE, "model.image_size": 192, "model.drop_path": 0.2, "optim.lr": 3e-3})


def deit3_l16() -> TrainConfig:
    """ViT-L/16 on ImageNet-1k at 192 px for 800 epochs.

    Published: 84.0 % at 192 px.
    Measured: not yet.
    Cost: 1.02e9 images, 2.76e20 FLOPs.
    """
    return override(deit3_b16(), {**LARGE, "model.drop_path": 0.45})


def deit3_h14() -> TrainConfig:
    """ViT-H/14 on ImageNet-1k at 160 px for 800 epochs.

    Published: 83.5 % at 160 px.
    Measured: not yet.
    Cost: 1.02e9 images, 4.80e20 FLOPs.
    """
    return override(deit3_b16(), {**HUGE, "model.image_size": 160, "model.drop_path": 0.6})


def deit3_s16_400() -> TrainConfig:
    """ViT-S/16 on ImageNet-1k for 400 epochs.

    Published: 80.4 %.
    Measured: not yet.
    Cost: 5.12e8 images, 1.41e19 FLOPs.
    """
    return override(deit3_s16(), {"model.drop_path": 0.0, "optim.weight_decay": 0.03, "epochs": 400})


def deit3_b16_400() -> TrainConfig:
    """ViT-B/16 on ImageNet-1k at 192 px for 400 epochs.

    Published: 83.4 % at 224 px.
    Measured: not yet.
    Cost: 5.12e8 images, 3.93e19 FLOPs.
    """
    return override(deit3_b16(), {"model.drop_path": 0.1, "optim.weight_decay": 0.03, "epochs": 400})


def deit3_l16_400() -> TrainConfig:
    """ViT-L/16 on ImageNet-1k at 192 px for 400 epochs.

    Published: 84.6 % at 224 px.
    Measured: not yet.
    Cost: 5.12e8 images, 1.38e20 FLOPs.
    """
    return override(deit3_l16(), {"model.drop_path": 0.4, "optim.weight_decay": 0.03, "epochs": 400})


def deit3_b16_ft224() -> TrainConfig:
    """ViT-B/16 of deit3_b16 fine-tuned at 224 px.

    Published: 83.8 %.
    Measured: not yet.
    Cost: 2.56e7 images, 2.70e18 FLOPs.
    """
    return override(
        deit3_b16(), {**FINE_TUNE, "init": "runs/deit3_b16", "model.image_size": 224, "model.drop_path": 0.2}
    )


def deit3_l16_ft224() -> TrainConfig:
    """ViT-L/16 of deit3_l16 fine-tuned at 224 px.

    Published: 84.9 %.
    Measured: not yet.
    Cost: 2.56e7 images, 9.46e18 FLOPs.
    """
    return override(
        deit3_l16(), {**FINE_TUNE, "init": "runs/deit3_l16", "model.image_size": 224, "model.drop_path": 0.45}
    )


def deit3_h14_ft224() -> TrainConfig:
    """ViT-H/14 of deit3_h14 fine-tuned at 224 px.

    Published: 85.2 %.
    Measured: not yet.
    Cost: 2.56e7 images, 2.57e19 FLOPs.
    """
    return override(
        deit3_h14(), {**FINE_TUNE, "init": "runs/deit3_h14", "model.image_size": 224, "model.drop_path": 0.55}
    )


def deit3_s16_ft384() -> TrainConfig:
    """ViT-S/16 of deit3_s16 fine-tuned at 384 px.

    Published: 83.4 %.
    Measured: not yet.
    Cost: 2.56e7 images, 2.38e18 FLOPs.
    """
    return override(
        deit3_s16(), {**FINE_TUNE, "init": "runs/deit3_s16", "model.image_size": 384, "model.drop_path": 0.0}
    )


def deit3_b16_ft384() -> TrainConfig:
    """ViT-B/16 of deit3_b16_ft224 fine-tuned at 384 px.

    Published: 85.1 %.
    Measured: not yet.
    Cost: 2.56e7 images, 8.53e18 FLOPs.
    """
    return override(
        deit3_b16_ft224(), {"init": "runs/deit3_b16_ft224", "model.image_size": 384, "model.drop_path": 0.15}
    )


def deit3_l16_ft384() -> TrainConfig:
    """ViT-L/16 of deit3_l16_ft224 fine-tuned at 384 px.

    Published: 85.8 %.
    Measured: not yet.
    Cost: 2.56e7 images, 2.94e19 FLOPs.
    """
    return override(
        deit3_l16_ft224(), {"init": "runs/deit3_l16_ft224", "model.image_size": 384, "model.drop_path": 0.4}
    )


def deit3_s16_in22k() -> TrainConfig:
    """ViT-S/16 on ImageNet-22k for 240 epochs.

    Published: only what follows from it (deit3_s16_in22k_ft1k).
    Measured: not yet.
    Cost: 3.41e9 images, 9.40e19 FLOPs; 3 300 GPU hours (deit#198, 32 GPUs).
    """
    return override(deit3_s16(), {**IN22K, "model.drop_path": 0.05})


def deit3_b16_in22k() -> TrainConfig:
    """ViT-B/16 on ImageNet-22k for 240 epochs, as in the registers paper.

    Published: linear probes 84.7 % ImageNet-1k, 38.9 mIoU ADE20k, 0.511 rmse NYUd; LOST 11.7 on VOC07 (tables 2a, 3).
    Measured: not yet.
    Cost: 3.41e9 images, 3.59e20 FLOPs; 4 800 GPU hours (deit#198, 32 GPUs).
    """
    return override(deit3_b16(), {**IN22K, "model.drop_path": 0.1})


def deit3_l16_in22k() -> TrainConfig:
    """ViT-L/16 on ImageNet-22k for 240 epochs.

    Published: only what follows from it (deit3_l16_in22k_ft1k).
    Measured: not yet.
    Cost: 3.41e9 images, 1.26e21 FLOPs; 12 700 GPU hours (deit#198, 32 GPUs).
    """
    return override(deit3_l16(), {**IN22K, "model.drop_path": 0.3})


def deit3_h14_in22k() -> TrainConfig:
    """ViT-H/14 on ImageNet-22k at 128 px for 90 epochs.

    Published: only what follows from it (deit3_h14_in22k_ft1k).
    Measured: not yet.
    Cost: 1.28e9 images, 4.00e20 FLOPs.
    """
    return override(deit3_h14(), {**IN22K, "model.image_size": 128, "model.drop_path": 0.5, "epochs": 90})


def deit3_s16_in22k_90() -> TrainConfig:
    """ViT-S/16 on ImageNet-22k for 90 epochs.

    Published: none.
    Measured: not yet.
    Cost: 1.28e9 images, 3.53e19 FLOPs; 1 200 GPU hours (deit#198, 32 GPUs).
    """
    return override(deit3_s16_in22k(), {"model.drop_path": 0.0, "epochs": 90})


def deit3_b16_in22k_90() -> TrainConfig:
    """ViT-B/16 on ImageNet-22k for 90 epochs.

    Published: none.
    Measured: not yet.
    Cost: 1.28e9 images, 1.35e20 FLOPs; 1 800 GPU hours (deit#198, 32 GPUs).
    """
    return override(deit3_b16_in22k(), {"model.drop_path": 0.1, "epochs": 90})


def deit3_l16_in22k_90() -> TrainConfig:
    """ViT-L/16 on ImageNet-22k for 90 epochs.

    Published: none.
    Measured: not yet.
    Cost: 1.28e9 images, 4.72e20 FLOPs; 4 800 GPU hours (deit#198, 32 GPUs).
    """
    return override(deit3_l16_in22k(), {"model.drop_path": 0.3, "epochs": 90})


def deit3_s16_in22k_ft1k() -> TrainConfig:
    """ViT-S/16 of deit3_s16_in22k fine-tuned on ImageNet-1k.

    Published: 83.1 %.
    Measured: not yet.
    Cost: 6.41e7 images, 1.77e18 FLOPs.
    """
    return override(deit3_s16_in22k(), {**TO_IN1K, "init": "runs/deit3_s16_in22k", "model.drop_path": 0.05})


def deit3_b16_in22k_ft1k() -> TrainConfig:
    """ViT-B/16 of deit3_b16_in22k fine-tuned on ImageNet-1k.

    Published: 85.7 %.
    Measured: not yet.
    Cost: 6.41e7 images, 6.75e18 FLOPs.
    """
    return override(deit3_b16_in22k(), {**TO_IN1K, "init": "runs/deit3_b16_in22k", "model.drop_path": 0.15})


def deit3_l16_in22k_ft1k() -> TrainConfig:
    """ViT-L/16 of deit3_l16_in22k fine-tuned on ImageNet-1k.

    Published: 87.0 %.
    Measured: not yet.
    Cost: 6.41e7 images, 2.37e19 FLOPs.
    """
    return override(deit3_l16_in22k(), {**TO_IN1K, "init": "runs/deit3_l16_in22k", "model.drop_path": 0.4})


def deit3_h14_in22k_ft1k() -> TrainConfig:
    """ViT-H/14 of deit3_h14_in22k fine-tuned on ImageNet-1k at 224 px.

    Published: 87.2 %.
    Measured: not yet.
    Cost: 6.41e7 images, 6.43e19 FLOPs.
    """
    return override(deit3_h14_in22k(), {**TO_IN1K, "init": "runs/deit3_h14_in22k", "model.drop_path": 0.45})
