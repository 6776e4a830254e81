"""Shapes of a dual encoder. This module imports no torch."""

from vitreg_core.config import Config, ViTConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class TextConfig(Config):
    """Shapes of open_clip's text tower."""

    context_length: int = 77
    """Tokens of a text, start and end included."""
    vocab_size: int = 49_408
    """Tokens that there are."""
    width: int = 512
    """Width of a token."""
    heads: int = 8
    """Attention heads."""
    layers: int = 12
    """Blocks."""


class ClipConfig(Config):
    """What fixes the shapes of a dual encoder."""

    vision: ViTConfig
    """The image tower; its `num_classes` is the width of the joint space."""
    text: TextConfig = TextConfig()
    """The text tower; its activation is that of the image tower."""
    bias: bool = False
    """Whether the logits have a learned bias, as SigLIP needs."""


def clip_vision(**fields: object) -> ViTConfig:
    """Shapes of open_clip's image tower: ViT-B/16 with a joint space of 512, unless fields say otherwise.

    LayerNorm before the blocks and after the registers join, no bias in patch embedding and projection, a position for
    the class token, epsilon 1e-5. Registers start with the deviation of the class token: near 0 they would stay alike.
    """
    tower = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "num_classes": 512}
    kind = {"pre_norm": True, "patch_bias": False, "head_bias": False, "class_position": True}
    return ViTConfig.model_validate({**tower, **kind, "norm_eps": 1e-5, "init": "clip", **fields})
