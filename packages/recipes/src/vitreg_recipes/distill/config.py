"""DistillConfig: registers added to a trained model. This module imports no torch."""

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from vitreg_core.config import Config, ViTConfig
from vitreg_core.errors import InputError

from vitreg_recipes.config import RunConfig, RunData


class StudentConfig(ViTConfig):
    """The model that learns: all but what is given here comes with the weights in `init`."""

    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None  # type: ignore[assignment]
    """Side in pixels of the images; as large as those of the model in `init` if not given."""


class PixelsConfig(RunData):
    """Images without labels, of `model.image_size` pixels."""

    path: str = "scenes"
    """`scenes`, drawn while training; any folder of images, with class folders or without; `hub:org/name`; or shards,
    'path/*.tar' or 'path/*.parquet'."""
    batch_size: PositiveInt = 8
    """Images per step, over all processes."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Least and greatest area of the random crop of a picture, over that of the picture."""


class ShiftConfig(Config):
    """The teacher: the model of the start, its patch tokens averaged over views that are drawn anew every step."""

    shifts: PositiveInt = 10
    """Views of an image."""
    share: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Largest shift over the side of the image; views move by whole patches, by one at least."""
    flips: bool = True
    """Whether views are mirrored at random."""


class DistillLossConfig(Config):
    """Weights of the losses; each is 1 - cosine plus the mean squared error of tokens after the final norm."""

    patches: PositiveFloat = 1.0
    """Weight of the patch tokens, which are to be the averaged ones of the teacher."""
    cls: NonNegativeFloat = 1.0
    """Weight of the class token, which is to be that of the teacher, so that heads on it still work."""


class DistillOptimConfig(Config):
    """AdamW (betas 0.9 and 0.999, epsilon 1e-8) with a linear warm-up, then a cosine."""

    lr: PositiveFloat = 1e-4
    """Highest learning rate, of registers and positions; it is not scaled by the batch size."""
    weights_lr: PositiveFloat = 1.0
    """Factor on the learning rate of patch embedding and blocks, every step of which moves many numbers at once."""
    min_lr: NonNegativeFloat = 5e-6
    """Learning rate at the end."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    weight_decay: NonNegativeFloat = 0.01
    """Decay of all that learns but biases, norms, LayerScale, tokens and positions."""


class DistillConfig(RunConfig):
    """A run that adds registers to the model in `init`, and trains little else."""

    signal: ClassVar[str] = "distill"
    model: StudentConfig = StudentConfig()
    """Registers, image size and drop path of the model."""
    data: PixelsConfig = PixelsConfig()
    """What to train on."""
    optim: DistillOptimConfig = DistillOptimConfig()
    """Optimizer and learning rate."""
    teacher: ShiftConfig = ShiftConfig()
    """Teacher."""
    loss: DistillLossConfig = DistillLossConfig()
    """Losses."""
    start: Literal["outliers", "random"] = "outliers"
    """New registers start as what the blocks read of outlier patches, whose places then take the position of their
    neighbours; or at random, as they do where there are no outliers."""
    last_blocks: NonNegativeInt = 1
    """Blocks at the end that learn; new registers, positions and patch embedding always do, all else never does."""

    @property
    def rates(self) -> str:
        """What to change where a loss is not finite."""
        return (
            f"lower optim.lr={self.optim.lr}, give a longer optim.warmup_steps={self.optim.warmup_steps}, or use "
            "precision=fp32"
        )

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            InputError: names the fields, their values, and what to do.
        """
        super().check()
        if not self.model.registers:
            raise InputError("model.registers=0: there is nothing to add; give 4, say")
        if self.optim.min_lr > self.optim.lr:
            raise InputError(
                f"optim.lr={self.optim.lr} is below optim.min_lr={self.optim.min_lr}; lr is the higher one"
            )
        if self.steps is not None and self.optim.warmup_steps > self.steps:
            raise InputError(
                f"optim.warmup_steps={self.optim.warmup_steps} of steps={self.steps}; warm up for fewer steps"
            )
        low, high = self.data.crop_scale
        if not 0 < low <= high <= 1:
            raise InputError(f"data.crop_scale={low} {high}: give two shares of the area, from low to high, at most 1")
        if self.model.image_size is not None and self.model.size[0] != self.model.size[1]:
            raise InputError(f"model.image_size={self.model.image_size}: crops are square; give one number")
        if self.strategy != "ddp":
            raise InputError(f"strategy={self.strategy}: the teacher is copied to every process; use ddp")
