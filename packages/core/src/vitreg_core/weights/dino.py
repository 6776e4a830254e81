"""DINO's official checkpoints: backbones, and full checkpoints, of which the teacher's backbone is read."""

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

NAMES = Names(PLAIN_STEM, PLAIN_BLOCKS)


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a ViT with a class token has nothing that DINO's has not; timm's without a head bring a config."""
    names = checkpoint.tensors
    return (
        {"cls_token", "pos_embed", "blocks.0.norm1.weight"} <= names.keys()
        and "architecture" not in checkpoint.config
        and all(NAMES.translate(name) for name in names)
    )


def read(checkpoint: Checkpoint) -> Weights:
    """Describe the model.

    Raises:
        InputError: a tensor does not fit.
    """
    parts = Parts(checkpoint, NAMES)
    size = place_with_class(parts)
    positions = {"position_antialias": False, "position_offset": 0.1}
    config = describe(checkpoint, parts, {"image_size": square(size), "norm_eps": 1e-6, **positions})
    return Weights(config, STANDARD, parts.tensors, parts.origins)
