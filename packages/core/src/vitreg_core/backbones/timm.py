"""timm's VisionTransformer, and its Eva in the form of DINOv3 and others with rotary positions."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_core.backbones.adapter import (
    Adapter,
    Shape,
    UnknownPreprocess,
    count_heads,
    meet,
    pair,
    refuse_masks,
    side,
    split_heads,
)
from vitreg_core.capturing import Arguments
from vitreg_core.config import PreprocessConfig, validate
from vitreg_core.data.images import Preprocess
from vitreg_core.errors import InputError
from vitreg_core.features import QKV

ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention")


class TimmBackbone(Adapter):
    """A timm model; `model` is a VisionTransformer or Eva."""

    model: Any
    patches_path = "patch_embed.proj"
    blocks_path = "blocks"
    attention_path = "attn"
    hidden_path = "mlp.fc2"
    norm_path = "norm"

    def __init__(self, model: nn.Module, preprocess: Preprocess | None) -> None:
        self.check_prefix(model)
        super().__init__(model, read_shape(model), preprocess or read_preprocess(model))

    def check_prefix(self, model: Any) -> None:  # noqa: ANN401 (a class of timm)
        """Refuse prefix tokens other than a class token and registers, such as the distillation token."""
        known = (model.cls_token is not None) + registers(model)
        if model.num_prefix_tokens != known:
            raise InputError(
                f"{type(model).__name__} has {model.num_prefix_tokens} prefix tokens, but only {known} are a class "
                "token or registers; give a model without others"
            )

    @property
    def native(self) -> tuple[int, int] | None:
        """Size of the images that the model was built for."""
        size = self.model.patch_embed.img_size
        return None if size is None else pair(size)

    def grid(self, images: Float[Tensor, "b 3 height width"]) -> tuple[int, int]:
        """Rows and columns of patches; timm may pad the last ones.

        Raises:
            InputError: images smaller than one patch, or of another size than the model takes.
        """
        super().grid(images)
        height, width = images.shape[-2:]
        embed = self.model.patch_embed
        if embed.strict_img_size and self.native not in (None, (height, width)):
            built = "x".join(map(str, embed.img_size))
            raise InputError(
                f"images of {height}x{width} pixels for a timm model of {built}; build it with dynamic_img_size=True, "
                f"or call its set_input_size(({height}, {width}))"
            )
        return embed.dynamic_feat_size((height, width))

    def run(self, images: Float[Tensor, "b 3 height width"]) -> None:
        """Run the model without its head."""
        self.model.forward_features(images)

    def embed(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b p d"]:
        """Patch embeddings; a model for any size keeps them as a grid."""
        embedded = self.model.patch_embed(images)
        return embedded if embedded.ndim == 3 else rearrange(embedded, "b rows cols d -> b (rows cols) d")

    def project(self, attention: Any, tokens: Float[Tensor, "b n d"]) -> QKV:  # noqa: ANN401 (a class of timm)
        """Queries, keys and values as projected, by one layer or by three."""
        check_attention(attention)
        if attention.qkv is None:
            projected = [layer(tokens) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        elif getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
            projected = list(F.linear(tokens, attention.qkv.weight, bias).chunk(3, dim=-1))
        else:
            projected = list(attention.qkv(tokens).chunk(3, dim=-1))
        heads = [split_heads(part, attention.head_dim) for part in projected]
        return QKV(*(part.repeat_interleave(attention.num_heads // part.shape[1], dim=1) for part in heads))

    def weights(self, attention: Any, arguments: Arguments) -> Float[Tensor, "b h n n"]:  # noqa: ANN401
        """Attention weights, after the norms and the rotation of the model."""
        refuse_masks(arguments)
        parts = self.project(attention, arguments["x"])
        queries, keys = attention.q_norm(parts.queries), attention.k_norm(parts.keys)
        if arguments.get("rope") is not None:
            queries, keys = (turn(part, attention, arguments["rope"]).type_as(parts.values) for part in (queries, keys))
        return meet(queries, keys)


def turn(tokens: Float[Tensor, "b h n k"], attention: Any, rope: Tensor) -> Float[Tensor, "b h n k"]:  # noqa: ANN401
    """Rotate the patches as timm does."""
    from timm.layers import apply_rot_embed_cat  # whoever has a timm model has timm

    prefix = attention.num_prefix_tokens
    patches = apply_rot_embed_cat(tokens[:, :, prefix:], rope, half=attention.rotate_half)
    return torch.cat([tokens[:, :, :prefix], patches], dim=2)


def check_attention(attention: nn.Module) -> None:
    """Refuse kinds of attention that are no plain softmax of queries and keys."""
    if type(attention).__name__ not in ATTENTIONS:
        raise InputError(
            f"queries, keys, values and attention of timm's {type(attention).__name__} are not known; "
            f"only those of {', '.join(ATTENTIONS)} are"
        )


def registers(model: Any) -> int:  # noqa: ANN401 (a class of timm)
    """Number of register tokens."""
    return 0 if model.reg_token is None else model.reg_token.shape[1]


def read_shape(model: Any) -> Shape:  # noqa: ANN401 (a class of timm)
    """The numbers of a model."""
    return Shape(
        patch_size=side(model.patch_embed.feat_ratio(as_scalar=False)),
        embed_dim=model.embed_dim,
        num_heads=count_heads(model.blocks[0]),
        class_token=model.cls_token is not None,
        num_registers=registers(model),
    )


def read_preprocess(model: Any) -> Preprocess:  # noqa: ANN401 (a class of timm)
    """What the model's `pretrained_cfg` says of images, at the size that the model takes."""
    from timm.data import resolve_model_data_config  # whoever has a timm model has timm

    if not getattr(model, "pretrained_cfg", None):
        return UnknownPreprocess(f"this {type(model).__name__} has no pretrained_cfg that says how images are prepared")
    config = resolve_model_data_config(model)
    size = set(model.patch_embed.img_size or config["input_size"][1:])
    if config["crop_mode"] != "center" or len(size) > 1:
        return UnknownPreprocess(f"{config['crop_mode']} crops of {sorted(size)} pixels are not supported")
    values = {
        "image_size": size.pop(),
        "crop_ratio": config["crop_pct"],
        "interpolation": config["interpolation"],
        "mean": config["mean"],
        "std": config["std"],
    }
    return Preprocess(validate(PreprocessConfig, values, "pretrained_cfg"))
