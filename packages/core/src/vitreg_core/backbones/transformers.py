"""The vision transformers of transformers: ViT, Dinov2 with and without registers, DINOv3ViT and CLIP's."""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg_core.attention import Rotation, rotate
from vitreg_core.backbones.adapter import (
    Adapter,
    Shape,
    UnknownPreprocess,
    meet,
    pair,
    refuse_masks,
    side,
    split_heads,
)
from vitreg_core.capturing import Arguments, find
from vitreg_core.data.images import Preprocess
from vitreg_core.features import QKV


class TransformersBackbone(Adapter):
    """A transformers model without head; `CLIPVisionModel` gives patches without the final norm, here they get it."""

    model: Any
    patches_path = "embeddings.patch_embeddings.projection|embeddings.patch_embeddings|embeddings.patch_embedding"
    blocks_path = "layers|encoder.layer|encoder.layers|model.layer"
    attention_path = "attention|self_attn"
    hidden_path = "mlp.fc2|mlp.down_proj"
    norm_path = "layernorm|norm|post_layernorm"

    def __init__(self, model: Any, preprocess: Preprocess | None) -> None:  # noqa: ANN401 (a class of transformers)
        config = model.config
        shape = Shape(
            patch_size=side(config.patch_size),
            embed_dim=config.hidden_size,
            num_heads=config.num_attention_heads,
            class_token=True,
            num_registers=getattr(config, "num_register_tokens", 0),
        )
        unknown = f"{type(model).__name__} does not say how images are prepared (its processor is a file of its own)"
        super().__init__(model, shape, preprocess or UnknownPreprocess(unknown))

    @property
    def native(self) -> tuple[int, int] | None:
        """Size of the images that the model was built for."""
        return pair(self.model.config.image_size)

    def run(self, images: Float[Tensor, "b 3 height width"]) -> None:
        """Run the model, which resizes its positions to the images: always, or where it is told to."""
        told = "interpolate_pos_encoding" in inspect.signature(self.model.embeddings.forward).parameters
        if told and images.shape[-2:] != self.native:
            self.model(images, interpolate_pos_encoding=True)
        else:
            self.model(images)

    def project(self, attention: nn.Module, tokens: Float[Tensor, "b n d"]) -> QKV:
        """Queries, keys and values as projected, by three layers."""
        layers = (find(attention, name, "queries, keys and values") for name in ("q_proj", "k_proj", "v_proj"))
        return QKV(*(split_heads(layer(tokens), self.embed_dim // self.num_heads) for layer in layers))

    def weights(self, attention: nn.Module, arguments: Arguments) -> Float[Tensor, "b h n n"]:
        """Attention weights, after the rotation of DINOv3."""
        refuse_masks(arguments)
        parts = self.project(attention, arguments["hidden_states"])
        if arguments.get("position_embeddings") is None:
            return meet(parts.queries, parts.keys)
        rotation = Rotation(*arguments["position_embeddings"])
        return meet(*(self.turn(part, rotation) for part in (parts.queries, parts.keys)))

    def turn(self, tokens: Float[Tensor, "b h n k"], rotation: Rotation) -> Float[Tensor, "b h n k"]:
        """Rotate the patches."""
        prefix = self.num_prefix_tokens
        return torch.cat([tokens[:, :, :prefix], rotate(tokens[:, :, prefix:], rotation)], dim=2)
