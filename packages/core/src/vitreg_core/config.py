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


class ViTConfig(Config):
    """What fixes the shapes of a vision transformer, and how it was meant to be built."""

    image_size: PositiveInt = 224
    """Side, in pixels, of the square images whose patch grid the stored positions fit."""
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
    """MLP with GELU, or SwiGLU with a packed first layer (DINOv2 g)."""
    registers: NonNegativeInt = 0
    """Register tokens; they carry no position and stand between the class token and the patches."""
    class_position: bool = False
    """Whether the class token has a position vector of its own (as in DINOv2 and the original ViT)."""
    layer_scale: PositiveFloat | None = None
    """Initial value of LayerScale; none leaves it out."""
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping a residual branch while training, the same in every block."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of every LayerNorm."""
    num_classes: NonNegativeInt = 0
    """Outputs of the classification head; 0 leaves the head out."""
    register_std: PositiveFloat = 0.02
    """Standard deviation of the registers at the start; near 0 they would start, and stay, alike."""
    position_antialias: bool = True
    """Whether positions are low-pass filtered when they are resized to a smaller grid."""
    position_offset: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Added to the grid size in the resize scale (0.1 in DINOv2 without registers); 0 resizes to the size itself."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the native image size."""
        side = self.image_size // self.patch_size
        return side, side


class PreprocessConfig(Config):
    """How a checkpoint expects its images: resize the shorter side, crop the centre, normalise."""

    image_size: PositiveInt = 224
    """Side of the crop in pixels."""
    crop_ratio: float = Field(default=1.0, gt=0.0, le=1.0)
    """Side of the crop over the shorter side after the resize."""
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
