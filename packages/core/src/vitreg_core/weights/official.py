"""Weights published by their authors as single files: official names and where they lie."""

from itertools import product

ROOT = "https://dl.fbaipublicfiles.com"


def dino() -> dict[str, str]:
    """DINO, by the names of its torch.hub entries."""
    files = {
        "dino_vits16": "dino_deitsmall16_pretrain",
        "dino_vits8": "dino_deitsmall8_pretrain",
        "dino_vitb16": "dino_vitbase16_pretrain",
        "dino_vitb8": "dino_vitbase8_pretrain",
    }
    return {name: f"{ROOT}/dino/{file}/{file}.pth" for name, file in files.items()}


def dinov2() -> dict[str, str]:
    """DINOv2; its torch.hub entries end in `_reg`, its files in `_reg4`, and both name the models with registers."""
    found = {}
    for size, suffix in product("sblg", ("", "_reg", "_reg4")):
        folder = f"dinov2_vit{size}14"
        file = f"{folder}{suffix and '_reg4'}_pretrain.pth"
        found[f"{folder}{suffix}"] = f"{ROOT}/dinov2/{folder}/{file}"
    return found


def deit3() -> dict[str, str]:
    """DeiT-III, by the names of its files; `21k` ones were fine-tuned on ImageNet-1k as well."""
    names = [
        *(f"deit_3_{size}_{pixels}_{data}" for size, pixels, data in product(*SIZES)),
        *(f"deit_3_medium_224_{data}" for data in SIZES[2]),
        "deit_3_huge_224_1k",
        "deit_3_huge_224_21k_v1",
    ]
    return {name: f"{ROOT}/deit/{name}.pth" for name in names}


def mae() -> dict[str, str]:
    """Encoders of MAE, by the names of their files."""
    names = [f"mae_pretrain_vit_{size}" for size in ("base", "large", "huge")]
    return {name: f"{ROOT}/mae/pretrain/{name}.pth" for name in names}


SIZES = (("small", "base", "large"), (224, 384), ("1k", "21k"))
OFFICIAL: dict[str, str] = {**dino(), **dinov2(), **deit3(), **mae()}
"""Official names and their addresses."""
