"""Runs of OpenCLIP: images and texts matched, with registers in the image tower by the name of the run."""

from vitreg_core.clip_config import TextConfig, clip_vision

from vitreg_recipes.contrast.config import CaptionsConfig, ContrastConfig, ContrastOptimConfig


def openclip_b16() -> ContrastConfig:
    """ViT-B/16 and a text tower on images with captions for 32 epochs, as OpenCLIP.

    Published: on licensed data, zero-shot 59.9 %, linear 78.2 % ImageNet-1k, 26.6 mIoU ADE20k, 0.702 rmse NYUd
    (registers paper, tables 2a, 2b).
    Measured: not yet.
    Cost: 1.30e10 images, 1.61e21 FLOPs on LAION-400M.
    """
    return ContrastConfig(
        model=clip_vision(),
        data=CaptionsConfig(path="captions/{00000..99999}.tar", batch_size=32768, workers=10),
        optim=ContrastOptimConfig(lr=5e-4, warmup_steps=2000),
        epochs=32,
        precision="bf16",
    )


def openclip_scenes() -> ContrastConfig:
    """Small towers on drawn scenes and what they say of themselves: minutes on two CPU cores.

    Published: none.
    Measured: zero-shot finds the texture (1 of 6) of 0.77 of 2048 other scenes, with 4 registers of 0.79, seed 0.
    Cost: 6.40e4 images, 1.41e13 FLOPs; six minutes of one CPU core.
    """
    return ContrastConfig(
        model=clip_vision(image_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=64),
        text=TextConfig(context_length=32, width=64, heads=2, layers=2),
        data=CaptionsConfig(path="scenes", batch_size=64),
        optim=ContrastOptimConfig(lr=2e-3, warmup_steps=100, weight_decay=0.1, clip=1.0),
        steps=1000,
        save_every=250,
    )


def openclip_captions() -> ContrastConfig:
    """Small towers on photos that a table names with their captions: minutes on two CPU cores.

    Published: none.
    Measured: on the sample, recall@1 among 79 images and 395 texts: trained ones 0.87 by image and 0.92 by text,
    held-out ones 0.01 and 0.04 (recall@10 0.22 and 0.31), seed 0.
    Cost: 21 120 images on the 1 421 captions of the sample.
    """
    return ContrastConfig(
        model=clip_vision(image_size=64, patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=64),
        text=TextConfig(context_length=40, width=128, heads=2, layers=2),
        data=CaptionsConfig(path="captions/train.csv", batch_size=64),
        optim=ContrastOptimConfig(lr=1e-3, warmup_steps=30, clip=1.0),
        epochs=15,
        save_every=110,
    )
