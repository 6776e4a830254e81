"""open_clip's image tower."""

from typing import Any

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


class OpenClipBackbone(Adapter):
    """An open_clip VisionTransformer; its `ln_post` is applied to all tokens."""

    model: Any
    patches_path = "conv1"
    blocks_path = "transformer.resblocks"
    attention_path = "attn"
    hidden_path = "mlp.c_proj"
    norm_path = "ln_post"

    def __init__(self, model: Any, preprocess: Preprocess | None) -> None:  # noqa: ANN401 (a class of open_clip)
        shape = Shape(
            patch_size=side(model.patch_size),
            embed_dim=model.transformer.width,
            num_heads=count_heads(model.transformer.resblocks[0]),
            class_token=True,
            num_registers=0,
        )
        super().__init__(model, shape, preprocess or read_preprocess(model))

    @property
    def native(self) -> tuple[int, int] | None:
        """Size of the images that the model was built for."""
        return pair(self.model.image_size)

    def grid(self, images: Float[Tensor, "b 3 height width"]) -> tuple[int, int]:
        """Rows and columns of patches.

        Raises:
            InputError: images of another size than the model takes.
        """
        grid = super().grid(images)
        if grid != tuple(self.model.grid_size):
            built = "x".join(map(str, self.model.image_size))
            raise InputError(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels for an open_clip model of {built}, which does "
                "not resize its positions; resize the images, or create the model with force_image_size"
            )
        return grid

    def run(self, images: Float[Tensor, "b 3 height width"]) -> None:
        """Run the tower."""
        self.model(images)

    def final_norm(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The final norm of all tokens; towers with attentional pooling norm what they have pooled, not the tokens."""
        if self.model.attn_pool is not None:
            raise InputError("an open_clip tower with attentional pooling has no final norm of tokens; use norm=False")
        return super().final_norm(tokens)

    def project(self, attention: Any, tokens: Float[Tensor, "b n d"]) -> QKV:  # noqa: ANN401 (of torch or open_clip)
        """Queries, keys and values as projected, by one packed matrix."""
        packed = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
        return QKV(*(split_heads(part, attention.head_dim) for part in packed.chunk(3, dim=-1)))

    def weights(self, attention: Any, arguments: Arguments) -> Float[Tensor, "b h n n"]:  # noqa: ANN401
        """Attention weights; those of torch's attention, or of open_clip's own with norms of queries and keys."""
        refuse_masks(arguments)
        parts = self.project(attention, next(iter(arguments.values())))
        if isinstance(attention, nn.MultiheadAttention):
            return meet(parts.queries, parts.keys)
        if attention.logit_scale is not None:
            raise InputError("attention of scaled cosines (scaled_cosine_attn) is not known; ask for other parts")
        return meet(attention.ln_q(parts.queries), attention.ln_k(parts.keys))


def read_preprocess(model: Any) -> Preprocess:  # noqa: ANN401 (a class of open_clip)
    """What `open_clip.create_model` noted on the tower."""
    config = getattr(model, "preprocess_cfg", None)
    if not config:
        return UnknownPreprocess("this open_clip tower has no preprocess_cfg that says how images are prepared")
    size = set(pair(config["size"]))
    if config["resize_mode"] != "shortest" or len(size) > 1:
        return UnknownPreprocess(f"resize_mode={config['resize_mode']!r} to {sorted(size)} pixels is not supported")
    values = {"image_size": size.pop(), **{name: config[name] for name in ("interpolation", "mean", "std")}}
    return Preprocess(validate(PreprocessConfig, values, "preprocess_cfg"))
