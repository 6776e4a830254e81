"""What every task takes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator
from vitreg_core.config import Config

AUTO: Literal["auto"] = "auto"


class TaskOptions(Config):
    """What every task takes."""

    model: tuple[str, ...] = ()
    """SOURCE of the model: a folder or run folder, a weights file, hub:org/name, timm:NAME, transformers:ID,
    open_clip:ARCH/TAG, an official name such as dinov2_vitb14_reg4, or a preset (random weights). May be repeated."""
    out: Path | None = None
    """Folder for result.json and pictures; runs/eval/<task> if not given."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Where to compute; the fastest there is if not given."""
    precision: Literal["fp32", "fp32-fast", "bf16"] = "fp32"
    """Exact float32, faster float32 products, or bfloat16."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of drawn scenes, heads and bootstrap; the same seed gives the same numbers."""
    batch_size: PositiveInt = 64
    """Images per forward pass."""
    cache: Path | None = None
    """Folder that keeps features between commands, and that the processes of `accelerate launch` share; a command that
    was stopped goes on where it was."""
    registers: tuple[NonNegativeInt | Literal["auto"], ...] = ()
    """Measure the model with its first registers alone, for each of these numbers (0,1,2,4), and draw the curve; auto
    runs an image with all registers where it has outliers without."""

    def needs(self) -> list[str]:
        """What must still be given before anything is loaded, one phrase each.

        Raises:
            InputError: options that do not go together.
        """
        return [] if self.model else ["--model SOURCE, a model or run folder, a weights file or a preset"]

    @field_validator("registers", mode="before")
    @classmethod
    def split_words(cls, given: str | Iterable[object]) -> tuple[object, ...]:
        """Take several numbers in one word, between commas."""
        words = [part for word in ([given] if isinstance(given, str) else given) for part in str(word).split(",")]
        if not all(word == AUTO or word.isdecimal() for word in words):
            raise ValueError("give numbers of registers such as 0,1,2,4, or auto")
        return tuple(words)
