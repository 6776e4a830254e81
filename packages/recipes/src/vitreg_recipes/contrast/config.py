"""ContrastConfig: a run that learns to match images and texts, as CLIP does. This module imports no torch."""

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from vitreg_core.clip_config import TextConfig, clip_vision
from vitreg_core.config import Config, ViTConfig
from vitreg_core.errors import InputError

from vitreg_recipes.config import RunConfig, RunData

TOKENS = 49_408
"""Tokens that open_clip's tokenizer knows."""


class CaptionsConfig(RunData):
    """Images with captions."""

    path: str = "scenes"
    """`scenes`, drawn while training; a table of `filepath` and `title` (.csv or .tsv, paths relative to it); shards of
    key.jpg with key.txt or key.json ('path/{00000..00331}.tar', or 'path/*.tar'); 'path/*.parquet'; or `hub:org/name`.
    Several are joined by `::`."""
    text: str | None = None
    """Column, or entry of key.json, that holds the captions; none takes the usual names (title, caption, text)."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Least and greatest share of an image's area that its random crop keeps; scenes are not cropped."""


class ContrastOptimConfig(Config):
    """AdamW and its learning rate: a linear warm-up, then a cosine to 0, step by step."""

    lr: PositiveFloat = 5e-4
    """Highest learning rate; it is not scaled by the batch size."""
    warmup_steps: NonNegativeInt = 2000
    """Steps of warm-up; the cosine has the rest of the run."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the first and of the second moment."""
    epsilon: PositiveFloat = 1e-6
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.2
    """Decay of all but class token, registers, biases, norms, and scale and bias of the logits."""
    clip: PositiveFloat | None = None
    """Greatest norm of the whole gradient; none does not clip."""


class ContrastConfig(RunConfig):
    """A run that learns to match images and texts (CLIP). `model` is the image tower."""

    signal: ClassVar[str] = "contrast"
    model: ViTConfig = Field(default_factory=clip_vision)
    """The image tower; `num_classes` is the width of the space that images and texts share."""
    text: TextConfig = TextConfig()
    """The text tower."""
    data: CaptionsConfig = CaptionsConfig()
    """What to train on."""
    optim: ContrastOptimConfig = ContrastOptimConfig()
    """Optimizer and learning rate."""
    loss: Literal["clip", "siglip"] = "clip"
    """Softmax over the batch in both directions, or a sigmoid for every pair of image and text (SigLIP)."""

    @property
    def rates(self) -> str:
        """What to change where a loss is not finite."""
        return (
            f"lower optim.lr={self.optim.lr}, give a longer optim.warmup_steps={self.optim.warmup_steps}, set "
            "optim.clip to 1, or use precision=fp32"
        )

    def check_outputs(self) -> None:
        """Refuse an image tower without a projection.

        Raises:
            InputError: says which width open_clip's has.
        """
        if not self.model.num_classes:
            raise InputError(
                "model.num_classes=0: it is the width of the space that images and texts share; give 512, say"
            )

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            InputError: names the fields, their values, and what to do.
        """
        super().check()
        check_optim(self)
        low, high = self.data.crop_scale
        if not 0 < low <= high <= 1:
            raise InputError(f"data.crop_scale={low} {high}: give two shares of the area, from low to high, at most 1")
        if self.model.size[0] != self.model.size[1]:
            raise InputError(f"model.image_size={self.model.image_size}: crops are square; give one number")
        if self.strategy != "ddp":
            raise InputError(f"strategy={self.strategy}: both towers are copied to every process; use ddp")
        if self.data.batch_size < 2:
            raise InputError(
                f"data.batch_size={self.data.batch_size}: an image is told from those of the rest of the batch; give 2 "
                "or more"
            )
        if self.text.vocab_size < TOKENS:
            raise InputError(f"text.vocab_size={self.text.vocab_size}: open_clip's tokenizer has {TOKENS}; give that")
        if self.text.context_length < 3:
            raise InputError(
                f"text.context_length={self.text.context_length}: start and end take two tokens; give 3 or more"
            )


def check_optim(config: ContrastConfig) -> None:
    """Refuse a warm-up that outlasts the run, and moments that never forget."""
    optim = config.optim
    if config.steps is not None and optim.warmup_steps > config.steps:
        raise InputError(f"optim.warmup_steps={optim.warmup_steps} of steps={config.steps}; warm up for fewer steps")
    if not all(0 <= beta < 1 for beta in optim.betas):
        first, second = optim.betas
        raise InputError(f"optim.betas={first} {second}: give two numbers from 0 to below 1")
