"""The dual encoder of CLIP (Radford et al. 2021): a register ViT for images, and open_clip's text tower."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_core.clip_config import CLIP_MEAN as CLIP_MEAN
from vitreg_core.clip_config import CLIP_STD as CLIP_STD
from vitreg_core.clip_config import ClipConfig as ClipConfig
from vitreg_core.clip_config import TextConfig as TextConfig
from vitreg_core.clip_config import clip_vision as clip_vision
from vitreg_core.config import PreprocessConfig
from vitreg_core.errors import InputError
from vitreg_core.extras import require
from vitreg_core.vit import VisionTransformer

TEMPERATURE = 0.07
"""Of the softmax at the start; the scale of the logits is one over it."""


class Encoded(NamedTuple):
    """A batch of images and texts in the joint space, each of unit length."""

    images: Float[Tensor, "b e"]
    texts: Float[Tensor, "b e"]


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
