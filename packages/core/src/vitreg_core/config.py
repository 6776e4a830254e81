"""Configs are values: frozen, complete and strict. This module imports no torch."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from vitreg_core.errors import InputError


class Config(BaseModel):
    """Base of every config: cannot change, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


class MovedConfig(Config):
    """Hidden units that test-time registers hold in place of the patches (`test_time.with_test_time_registers`)."""

    neurons: tuple[tuple[NonNegativeInt, NonNegativeInt], ...]
    """Block and hidden unit of each, from 0."""
    first: NonNegativeInt
    """Where the first test-time register stands in the sequence."""
    registers: NonNegativeInt
    """How many stand there; they count among the registers of the model."""
    biases: NonNegativeInt
    """Pairs of a key and a value that every head attends to besides the tokens, in place of such registers."""


class ViTConfig(Config):
    """What fixes the shapes of a vision transformer, and how it was meant to be built."""

    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
    """Side in pixels, or height and width, of the images whose patch grid the stored positions fit."""
    patch_size: PositiveInt = 16
    """Side of a patch in pixels."""
    embed_dim: PositiveInt = 384
    """Width of a token."""
    depth: PositiveInt = 12
    """Number of blocks."""
    num_heads: PositiveInt = 6
    """Attention heads; must divide embed_dim."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden units of an MLP over embed_dim (before the 2/3 rule of SwiGLU)."""
    feed_forward: Literal["mlp", "swiglu"] = "mlp"
    """MLP with two layers, or SwiGLU with a packed first layer (DINOv2 g)."""
    swiglu_align: PositiveInt = 8
    """The hidden units of SwiGLU are rounded up to a multiple of this."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Between the layers of an MLP: exact GELU, or x * sigmoid(1.702 x) as in OpenAI's CLIP."""
    class_token: bool = True
    """Whether there is a class token in front."""
    registers: NonNegativeInt = 0
    """Register tokens; they carry no position and stand between the class token and the patches."""
    mask_token: bool = False
    """Whether there is a learned vector for masked patches (DINOv2)."""
    position: Literal["learned", "rope"] = "learned"
    """A learned vector per patch, or rotary embedding of queries and keys of patches (DINOv3)."""
    class_position: bool = False
    """Whether the class token has a learned position of its own (as in DINOv2 and the original ViT)."""
    position_antialias: bool = True
    """Whether positions are low-pass filtered when they are resized to a smaller grid."""
    position_offset: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Added to the grid size in the resize scale (0.1 in DINOv2 without registers); 0 resizes to the size itself."""
    rope_base: PositiveFloat = 100.0
    """Longest over shortest wavelength of the rotary embedding."""
    pre_norm: bool = False
    """Whether a LayerNorm stands before the first block (CLIP)."""
    patch_bias: bool = True
    """Whether the patch embedding has a bias (CLIP has none)."""
    qkv_bias: bool = True
    """Whether queries, keys and values have a bias."""
    qk_norm: bool = False
    """Whether queries and keys pass a LayerNorm per head."""
    layer_scale: PositiveFloat | None = None
    """Initial value of LayerScale; none leaves it out."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of every LayerNorm."""
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping a residual branch while training."""
    drop_path_schedule: Literal["constant", "linear"] = "constant"
    """The same probability in every block (DeiT-III, DINOv2), or rising from 0 to it with the depth (timm)."""
    stochastic_depth: Literal["sample", "subset"] = "sample"
    """Drop branches of single samples, or run them on a random subset of the batch (DINOv2)."""
    num_classes: NonNegativeInt = 0
    """Outputs of the head, classes or the joint space of CLIP; 0 leaves the head out."""
    head_bias: bool = True
    """Whether the head has a bias (the projection of CLIP has none)."""
    pool: Literal["cls", "avg"] = "cls"
    """What the head reads: the class token, or the mean of the patches."""
    norm_pooled: bool = False
    """Whether the final norm acts on what the head reads, and leaves the tokens without one (timm's fc_norm)."""
    init: Literal["deit3", "dinov2", "clip"] = "deit3"
    """Recipe of the random start."""
    register_std: PositiveFloat | None = None
    """Standard deviation of the registers at the start, in place of the recipe's; near 0 they would stay alike."""
    moved: MovedConfig | None = None
    """Hidden units that were moved off the patches without training; none in a model as it was trained."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the stored positions fit."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the native image size."""
        height, width = self.size
        return height // self.patch_size, width // self.patch_size

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.embed_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Hidden units of the feed-forward network."""
        hidden = round(self.embed_dim * self.mlp_ratio)
        return hidden if self.feed_forward == "mlp" else -(-(hidden * 2 // 3) // self.swiglu_align) * self.swiglu_align

    @property
    def prefix(self) -> tuple[Literal["cls", "register"], ...]:
        """Kinds of the tokens that stand before the patches, in order."""
        return (*(("cls",) if self.class_token else ()), *("register" for _ in range(self.registers)))


def check_shapes(config: ViTConfig) -> None:
    """Refuse shapes that cannot be built.

    Raises:
        InputError: names the fields, and what to do.
    """
    if config.embed_dim % config.num_heads:
        raise InputError(f"num_heads={config.num_heads} does not divide embed_dim={config.embed_dim}; change one")
    if min(config.size) < config.patch_size:
        raise InputError(
            f"image_size={config.image_size} is smaller than patch_size={config.patch_size}; give a larger image_size"
        )
    if config.position == "rope" and config.head_dim % 4:
        raise InputError(f"rotary positions need heads of a multiple of 4 channels, not {config.head_dim}")
    if not config.class_token and config.pool == "cls":
        raise InputError('without a class token the head reads the patches; set pool="avg"')
    if config.class_position and (config.position == "rope" or not config.class_token):
        raise InputError("class_position=True needs a class token and learned positions; set class_position=False")


class PreprocessConfig(Config):
    """How a checkpoint expects its images: resize, crop the centre, normalise."""

    image_size: PositiveInt = 224
    """Side of the crop in pixels."""
    crop_ratio: float = Field(default=1.0, gt=0.0, le=1.0)
    """Side of the crop over the shorter side after the resize."""
    crop_corner: Literal["round", "floor"] = "round"
    """Where the crop starts when half a pixel is left: at the even one (timm), or before (transformers)."""
    resize: Literal["shorter", "squash"] = "shorter"
    """Resize the shorter side and keep the aspect, or make both sides alike."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter of the resize, as Pillow does it (antialiased)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean of pixel values in 0 to 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation of pixel values in 0 to 1."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean X?" for the name closest to a misspelt one, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def validate(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """Build a config from plain values.

    Raises:
        InputError: names the field, the value, what is wrong, and the nearest field for an unknown one.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        hint = nearest(name, field_names(cls)) if first["type"] == "extra_forbidden" else ""
        reason = "unknown option" if hint or first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"{where} {name}={first['input']!r}: {reason}{hint}") from None


def field_names(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """List every field of a config and of the configs in it, dotted."""
    for name, field in cls.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from field_names(field.annotation, f"{prefix}{name}.")


def override(config: C, changes: Mapping[str, Any], where: str = "") -> C:
    """Return a config with some fields replaced, checked as a whole; dotted names reach into nested configs.

    Raises:
        InputError: unknown field (with the nearest name) or a value that does not fit.
    """
    values = config.model_dump()
    for dotted, value in changes.items():
        *sections, name = dotted.split(".")
        target = values
        for section in sections:
            if not isinstance(target.get(section), dict):
                raise InputError(f"{dotted}={value!r}: unknown option{nearest(dotted, field_names(type(config)))}")
            target = target[section]
        target[name] = value
    return validate(type(config), values, where or type(config).__name__)
