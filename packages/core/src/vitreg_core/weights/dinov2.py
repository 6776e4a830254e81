"""DINOv2's official checkpoints, with and without registers: released backbones, and teachers saved in training."""

from vitreg_core.weights.checkpoint import (
    PLAIN_BLOCKS,
    PLAIN_STEM,
    STANDARD,
    Checkpoint,
    Names,
    Parts,
    Weights,
    describe,
    place_with_class,
    square,
)

NAMES = Names(
    stem={**PLAIN_STEM, "register_tokens": "registers.tokens", "mask_token": "mask_token"},
    blocks={
        **PLAIN_BLOCKS,
        "mlp.w12": "mlp.w12",
        "mlp.w3": "mlp.w3",
        "ls1.gamma": "ls1.gamma",
        "ls2.gamma": "ls2.gamma",
    },
    block=r"blocks\.(?:\d+\.)?(\d{1,4})\.",  # in training, blocks come in chunks, and keep their number
)
WITH_REGISTERS = {"position_antialias": True, "position_offset": 0.0}
WITHOUT = {"position_antialias": False, "position_offset": 0.1}


def matches(checkpoint: Checkpoint) -> bool:
    """Whether there are a mask token and a table of positions, and no decoder."""
    names = checkpoint.tensors
    return {"mask_token", "pos_embed"} <= names.keys() and "decoder_embed.weight" not in names


def read(checkpoint: Checkpoint) -> Weights:
    """Describe the model.

    Raises:
        InputError: a tensor does not fit.
    """
    parts = Parts(checkpoint, NAMES)
    size = place_with_class(parts)
    positions = WITH_REGISTERS if "registers.tokens" in parts else WITHOUT
    config = describe(checkpoint, parts, {"image_size": square(size), "norm_eps": 1e-6, **positions})
    return Weights(config, STANDARD, parts.tensors, parts.origins)
