"""MAE's official checkpoints: encoders, whole autoencoders of which the encoder is read, and fine-tuned ones."""

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
    stem={**PLAIN_STEM, "fc_norm": "fc_norm", "head": "head"},
    blocks=PLAIN_BLOCKS,
    dropped=r"decoder_|mask_token$",  # they only serve to paint the masked patches
)


def matches(checkpoint: Checkpoint) -> bool:
    """Whether there is a decoder, or the class token's row of positions is 0 and neither timm nor DINO has such."""
    names = checkpoint.tensors
    if "architecture" in checkpoint.config or not {"cls_token", "pos_embed", "blocks.0.norm1.weight"} <= names.keys():
        return False
    if not all(NAMES.translate(name) is not None for name in names):
        return False
    table = names["pos_embed"]
    fixed = table.ndim == 3 and table.shape[1] > 0 and not table[0, 0].any()
    return "decoder_embed.weight" in names or "fc_norm.weight" in names or fixed


def read(checkpoint: Checkpoint) -> Weights:
    """Describe the model.

    Raises:
        InputError: a tensor does not fit.
    """
    parts = Parts(checkpoint, NAMES)
    size = place_with_class(parts)
    facts = {"image_size": square(size), "norm_eps": 1e-6, "position_antialias": False}
    pool = "avg" if "fc_norm.weight" in parts else "cls"
    config = describe(checkpoint, parts, {**facts, "pool": pool})
    return Weights(config, STANDARD, parts.tensors, parts.origins)
