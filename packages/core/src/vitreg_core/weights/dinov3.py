"""DINOv3's official checkpoints, and what all libraries' copies of them need."""

import torch

from vitreg_core.errors import InputError
from vitreg_core.weights.checkpoint import (
    PLAIN_BLOCKS,
    PLAIN_STEM,
    STANDARD,
    Checkpoint,
    Names,
    Parts,
    Weights,
    describe,
)
from vitreg_core.weights.files import shape

NAMES = Names(
    stem={
        **PLAIN_STEM,
        "storage_tokens": "registers.tokens",
        "mask_token": "mask_token",
        "rope_embed.periods": "periods",
        "cls_norm": "cls_norm",
    },
    blocks={
        **PLAIN_BLOCKS,
        "mlp.w1": "mlp.w1",
        "mlp.w2": "mlp.w2",
        "mlp.w3": "mlp.w3",
        "ls1.gamma": "ls1.gamma",
        "ls2.gamma": "ls2.gamma",
    },
    # the mask says that keys have no bias, and the other norm served small crops in training
    dropped=r"blocks\.\d+\.attn\.qkv\.bias_mask$|local_cls_norm\.",
)
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32}
BASE = 100.0


def matches(checkpoint: Checkpoint) -> bool:
    """Whether registers have DINOv3's name."""
    return "storage_tokens" in checkpoint.tensors


def read(checkpoint: Checkpoint) -> Weights:
    """Describe the model.

    Raises:
        InputError: a tensor does not fit, or the model has two final norms.
    """
    parts = Parts(checkpoint, NAMES)
    for name in ("cls_norm.weight", "cls_norm.bias"):
        if name in parts:
            raise InputError(
                f"{parts.file}: tensor {name}: this model norms its class token and its patches differently, "
                "which no model here does"
            )
    heads = {"num_heads": heads_of(parts)} if "periods" in parts else {}
    if "blocks.0.attn.qkv.bias" in parts:
        clear_key_bias(parts)
    config = describe(checkpoint, parts, {"image_size": 224, **finish(parts), **heads})
    return Weights(config, STANDARD, parts.tensors, parts.origins)


def finish(parts: Parts) -> dict[str, object]:
    """Join what copies of DINOv3 keep apart, and say what their tensors do not."""
    for index in range(parts.depth):
        block = f"blocks.{index}"
        if f"{block}.attn.q.bias" in parts:
            keys = f"{block}.attn.k.bias"
            queries = parts.tensors[f"{block}.attn.q.bias"]
            parts.tensors[keys], parts.origins[keys] = torch.zeros_like(queries), f"{block}.attn.k_bias"
            parts.join([f"{block}.attn.{part}.bias" for part in "qkv"], f"{block}.attn.qkv.bias")
        if f"{block}.mlp.w1.weight" in parts:
            for kind in ("weight", "bias"):
                parts.join([f"{block}.mlp.w1.{kind}", f"{block}.mlp.w2.{kind}"], f"{block}.mlp.w12.{kind}")
                if f"{block}.mlp.fc2.{kind}" in parts:
                    ours = f"{block}.mlp.w3.{kind}"
                    parts.origins[ours] = parts.origins.pop(f"{block}.mlp.fc2.{kind}")
                    parts.tensors[ours] = parts.tensors.pop(f"{block}.mlp.fc2.{kind}")
    width = parts.shape("patch_embed.proj.weight", 4)[0]
    heads = {"num_heads": HEADS[width]} if width in HEADS else {}
    return {"norm_eps": 1e-5, "rope_base": BASE, **heads}


def heads_of(parts: Parts) -> int:
    """Heads that the periods of the rotary embedding imply, of which each head of k channels has k/4.

    Raises:
        InputError: they are not those that DINOv3 was released with.
    """
    (count,) = parts.shape("periods", 1)
    periods, width = parts.tensors.pop("periods"), parts.shape("patch_embed.proj.weight", 4)[0]
    released = BASE ** (torch.arange(count) / count)
    # the released files hold them in the precision of bfloat16
    if width % (4 * count) or not torch.allclose(periods.float(), released, rtol=1e-2):
        raise InputError(
            f"{parts.file}: tensor {parts.origins['periods']} of shape {shape(periods)} is not 100 ** (i / {count}), "
            "the only rotary embedding that can be read"
        )
    return width // (4 * count)


def clear_key_bias(parts: Parts) -> None:
    """Set the bias of the keys to 0, which DINOv3 masks whatever the file holds."""
    for index in range(parts.depth):
        name = f"blocks.{index}.attn.qkv.bias"
        if name in parts:
            queries, keys, values = parts.tensors[name].chunk(3)
            parts.tensors[name] = torch.cat([queries, torch.zeros_like(keys), values])
