"""The dual encoder of CLIP (Radford et al. 2021): a register ViT for images, and open_clip's text tower."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_core.config import Config, PreprocessConfig, ViTConfig
from vitreg_core.errors import InputError
from vitreg_core.extras import require
from vitreg_core.vit import VisionTransformer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TEMPERATURE = 0.07
"""Of the softmax at the start; the scale of the logits is one over it."""


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


class Encoded(NamedTuple):
    """A batch of images and texts in the joint space, each of unit length."""

    images: Float[Tensor, "b e"]
    texts: Float[Tensor, "b e"]


def clip_vision(**fields: object) -> ViTConfig:
    """Shapes of open_clip's image tower: ViT-B/16 with a joint space of 512, unless fields say otherwise.

    LayerNorm before the blocks and after the registers join, no bias in patch embedding and projection, a position for
    the class token, epsilon 1e-5. Registers start with the deviation of the class token: near 0 they would stay alike.
    """
    tower = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "num_classes": 512}
    kind = {"pre_norm": True, "patch_bias": False, "head_bias": False, "class_position": True}
    return ViTConfig.model_validate({**tower, **kind, "norm_eps": 1e-5, "init": "clip", **fields})


class DualEncoder(nn.Module):
    """An image tower and a text tower, whose outputs are compared by cosine.

    `logit_scale` is the log of the factor on the cosines, as in open_clip.
    """

    def __init__(self, config: ClipConfig, preprocess: PreprocessConfig | None = None, *, source: str = "") -> None:
        """Build both towers with random weights.

        Raises:
            InputError: no joint space, or open_clip is not installed.
        """
        super().__init__()
        vision = config.vision
        if not vision.num_classes:
            raise InputError("num_classes=0: it is the width of the joint space of images and texts; give 512, say")
        self.config = config
        self.source = source
        size = max(vision.size)
        default = PreprocessConfig(image_size=size, mean=CLIP_MEAN, std=CLIP_STD, crop_ratio=1.0)
        self.visual = VisionTransformer(vision, preprocess or default, source=source)
        self.text = build_text_tower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0 if config.bias else 1 / TEMPERATURE)))  # scalar
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.bias else None  # scalar

    def forward(self, images: Float[Tensor, "b 3 height width"], tokens: Int[Tensor, "b context"]) -> Encoded:
        """Images and texts in the joint space, of unit length."""
        return Encoded(self.encode_image(images, normalize=True), self.encode_text(tokens, normalize=True))

    def encode_image(
        self, images: Float[Tensor, "b 3 height width"], *, normalize: bool = False
    ) -> Float[Tensor, "b e"]:
        """Images in the joint space.

        Args:
            images: normalised pixels.
            normalize: scale to unit length.
        """
        features = self.visual.classify(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Int[Tensor, "b context"], *, normalize: bool = False) -> Float[Tensor, "b e"]:
        """Texts in the joint space.

        Args:
            tokens: of open_clip's tokenizer (`open_clip.tokenize`).
            normalize: scale to unit length.
        """
        features = self.text(tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def export(self, folder: Path) -> None:
        """Write into a folder that open_clip opens, and `load_clip`.

        Raises:
            InputError: open_clip has no such model (names the field), or the folder cannot be written.
        """
        from vitreg_core.weights.clip import save_clip  # which builds on this module

        save_clip(self, folder)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.logit_scale.device


def build_text_tower(config: ClipConfig) -> nn.Module:
    """Open_clip's text tower.

    Raises:
        InputError: open_clip is not installed, or shapes that do not fit.
    """
    require("open_clip", "open-clip", "the text tower of a dual encoder")
    from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer

    text = config.text
    if text.width % text.heads:
        raise InputError(f"text.width={text.width} does not divide by text.heads={text.heads}; give a multiple")
    return TextTransformer(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        width=text.width,
        heads=text.heads,
        layers=text.layers,
        output_dim=config.vision.num_classes,
        act_layer=QuickGELU if config.vision.activation == "quick_gelu" else nn.GELU,
        norm_layer=LayerNorm,
    )
