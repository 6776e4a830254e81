"""How the parameters of a model start, by recipe."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from vitreg_core.attention import Attention

if TYPE_CHECKING:
    from vitreg_core.vit import VisionTransformer

RECIPE_STD = {"deit3": 0.02, "dinov2": 1e-6}
"""Standard deviation of class token and registers; for CLIP it is embed_dim ** -0.5."""


def initialise(model: "VisionTransformer") -> None:
    """Fill a model as its recipe does; LayerNorms, LayerScale and convolutions keep what they were built with.

    DeiT-III: tokens, positions and linear weights normal with std 0.02, cut at +-2. DINOv2: the same, but class token
    and registers with std 1e-6. CLIP: tokens, positions and the projection normal with std embed_dim ** -0.5, the
    packed qkv uniform (Xavier), other linear weights as torch's default. Biases are 0, but CLIP's in the MLP. The std
    of the registers is replaced by `register_std` where the config has one.
    """
    config = model.config
    clip = config.init == "clip"
    wide = config.embed_dim**-0.5
    std = wide if clip else RECIPE_STD[config.init]
    for module in model.modules():
        if isinstance(module, Attention) and clip:
            nn.init.xavier_uniform_(module.qkv.weight)
            zero(module.qkv.bias)
            zero(module.proj.bias)
        elif isinstance(module, nn.Linear) and not clip:
            fill(module.weight, 0.02)
            zero(module.bias)
    if model.head is not None and clip:
        fill(model.head.weight, wide)
        zero(model.head.bias)
    if model.positions is not None:
        for parameter in model.positions.parameters():
            fill(parameter, wide if clip else 0.02)
    if model.cls is not None:
        fill(model.cls, std)
    fill(model.registers.tokens, config.register_std or std)


def fill(parameter: Tensor, std: float) -> None:
    """Normal values, cut at +-2 (absolute, so hardly ever)."""
    nn.init.trunc_normal_(parameter, std=std)


def zero(bias: Tensor | None) -> None:
    """Zeros where there is a bias."""
    if bias is not None:
        nn.init.zeros_(bias)
