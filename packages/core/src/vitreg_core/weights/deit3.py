"""DeiT-III's official checkpoints, and those of its reproduction with registers."""

from vitreg_core.config import PreprocessConfig
from vitreg_core.weights.checkpoint import (
    PLAIN_BLOCKS,
    PLAIN_STEM,
    Checkpoint,
    Names,
    Parts,
    Weights,
    describe,
    place,
    square,
)

NAMES = Names(
    stem={**PLAIN_STEM, "reg_tokens": "registers.tokens", "head": "head"},
    blocks={**PLAIN_BLOCKS, "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"},
)


def matches(checkpoint: Checkpoint) -> bool:
    """Whether LayerScale has DeiT-III's name and positions are learned; timm's files, which say so, are its own."""
    own = "architecture" not in checkpoint.config
    return own and {"blocks.0.gamma_1", "blocks.0.attn.qkv.bias", "pos_embed"} <= checkpoint.tensors.keys()


def read(checkpoint: Checkpoint) -> Weights:
    """Describe the model.

    Raises:
        InputError: a tensor does not fit.
    """
    parts = Parts(checkpoint, NAMES)
    _, size = place(parts, [0])
    facts = {"image_size": square(size), "norm_eps": 1e-6, "position_antialias": False}
    config = describe(checkpoint, parts, facts)
    return Weights(config, PreprocessConfig(image_size=max(size)), parts.tensors, parts.origins)
