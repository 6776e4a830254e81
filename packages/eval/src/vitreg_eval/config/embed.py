"""Options of the command that writes features for other programs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import field_validator
from vitreg_core.errors import InputError

from vitreg_eval.config.base import TaskOptions

TOKENS = ("cls", "registers", "patches", "mean_patch")


class EmbedOptions(TaskOptions):
    """Write features of images, with their names and labels, to a file that other programs read."""

    images: Path | None = None
    """Folder of photos without labels."""
    data: Path | None = None
    """Folder of a labelled data set, or one with train/<class>/ and val/<class>/ images."""
    dataset: str | None = None
    """Name of a data set in its official layout (`vitreg-eval list` names them) or hub:ORG/NAME; class folders if not
    given."""
    split: Literal["train", "val"] = "val"
    """Which part of a labelled data set."""
    tokens: tuple[Literal["cls", "registers", "patches", "mean_patch"], ...] = ("cls",)
    """Which tokens, between commas (cls,registers,patches); mean_patch is the mean of the patch tokens."""
    layer: int = -1
    """Block that they come from, 0 being the first and -1 the last."""
    norm: bool = True
    """Whether the final norm is applied."""
    dtype: Literal["fp16", "fp32"] = "fp32"
    """Number type of the file."""
    format: Literal["npz", "parquet", "safetensors"] = "npz"
    """Kind of file; parquet has a row for each image, the others an array for each kind of token."""

    def needs(self) -> list[str]:
        """As for every task."""
        labelled = self.data is not None or self.dataset is not None
        if labelled and self.images is not None:
            raise InputError(f"--images {self.images} with --data or --dataset: give photos or a labelled data set")
        if self.registers:
            raise InputError("--registers is how many a model computes with; to write theirs give --tokens registers")
        there = labelled or self.images is not None
        return super().needs() + ([] if there else ["--images DIR or --data DIR, what to embed"])

    @field_validator("tokens", mode="before")
    @classmethod
    def split_tokens(cls, given: str | Iterable[str]) -> tuple[str, ...]:
        """Take several kinds in one word, between commas."""
        words = [part for word in ([given] if isinstance(given, str) else given) for part in word.split(",")]
        if unknown := set(words) - set(TOKENS) or (not words and {"none"}):
            raise ValueError(f"{', '.join(sorted(unknown))}: give some of {', '.join(TOKENS)}")
        return tuple(dict.fromkeys(words))
