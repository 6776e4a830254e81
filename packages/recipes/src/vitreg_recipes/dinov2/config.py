"""DinoConfig: a self-supervised run of DINOv2. This module imports no torch.

Lengths that the official configs give in epochs of 1,250 iterations are steps here.
"""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from vitreg_core.config import Config
from vitreg_core.errors import InputError

from vitreg_recipes.config import RUNS, RunConfig, RunData


class CropsConfig(RunData):
    """Images without labels, and the crops of each: two global ones of `model.image_size`, and smaller local ones."""

    path: str = "scenes"
    """`scenes`, drawn while training; any folder of images, with class folders or without; `hub:org/name`; or shards,
    'path/*.tar' or 'path/*.parquet'."""
    batch_size: PositiveInt = 2048
    """Images per step, over all processes."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Least and greatest area of a global crop, over that of the image."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """The same of a local crop."""
    local_crops: NonNegativeInt = 8
    """Local crops of an image."""
    local_size: PositiveInt = 96
    """Side of a local crop in pixels, a multiple of the patch."""
    blur: Literal["effective", "nominal", "none"] = "effective"
    """How often the first global, second global and local crops are blurred: 0, 0.9, 0.5 as the released models were
    trained, or 1, 0.1, 0.5 as the papers say; the official code hands the complement on. None suits tiny crops, of
    which the blur leaves little."""
    jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (0.4, 0.4, 0.2, 0.1)
    """Greatest change of brightness, contrast, saturation and, at most 0.5, hue."""


class DinoHeadConfig(Config):
    """A head over prototypes."""

    prototypes: PositiveInt = 65_536
    """Outputs."""
    hidden: PositiveInt = 2048
    """Width of the hidden layers."""
    bottleneck: PositiveInt = 256
    """Width of the layer before the prototypes."""
    layers: PositiveInt = 3
    """Linear layers before the prototypes."""


class DinoLossConfig(Config):
    """Weights and details of the losses."""

    dino: NonNegativeFloat = 1.0
    """Weight of the loss between class tokens of crops."""
    ibot: NonNegativeFloat = 1.0
    """Weight of the loss on masked patches; 0 masks nothing."""
    koleo: NonNegativeFloat = 0.1
    """Weight of KoLeo, on each global crop; it needs two images per process."""
    gram: NonNegativeFloat = 0.0
    """Weight of Gram anchoring to the teacher of the start (DINOv3); 0 keeps no anchor."""
    centering: Literal["center", "sinkhorn"] = "center"
    """Teacher targets: softmax after centring, or Sinkhorn-Knopp."""
    mask_share: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the global crops that are masked."""
    mask_ratios: tuple[float, float] = (0.1, 0.5)
    """Least and greatest share of patches that a mask hides."""


class TeacherConfig(Config):
    """The teacher."""

    momentum: float = Field(default=0.992, ge=0.0, le=1.0)
    """What it keeps of itself at the start, rising to 1 by a cosine; 1 freezes it."""
    temperature: tuple[PositiveFloat, PositiveFloat] = (0.04, 0.07)
    """Of its targets, at the start and after `temperature_steps`."""
    temperature_steps: NonNegativeInt = 37_500
    """Steps over which the temperature rises."""
    source: str | None = None
    """SOURCE of a frozen, larger teacher to distil, with its heads beside it; none trains teacher and student."""


class DinoOptimConfig(Config):
    """AdamW (betas 0.9 and 0.999, epsilon 1e-8) and its schedules."""

    lr: PositiveFloat = 4e-3
    """Highest learning rate for 1,024 images per step; scaled by the square root of their number over that."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end; not scaled."""
    warmup_steps: NonNegativeInt = 12_500
    """Steps of linear warm-up from 0."""
    weight_decay: tuple[NonNegativeFloat, NonNegativeFloat] = (0.04, 0.4)
    """At the start and at the end, by a cosine; not on biases, norms and LayerScale, but on tokens and positions."""
    layer_decay: float = Field(default=0.9, gt=0.0, le=1.0)
    """Factor on the learning rate from a block to the one before it."""
    patch_embed_lr: PositiveFloat = 0.2
    """Factor on the learning rate of the patch embedding."""
    freeze_last_steps: NonNegativeInt = 1250
    """Steps at the start in which the prototypes rest."""
    freeze_backbone_steps: NonNegativeInt = 0
    """Steps at the start in which only the heads learn, which are new beside a backbone from `init`."""
    clip: PositiveFloat = 3.0
    """Greatest gradient norm of the backbone, and of each head."""


class DinoConfig(RunConfig):
    """A self-supervised run of DINOv2. The teacher's backbone is what it gives."""

    signal: ClassVar[str] = "dinov2"
    data: CropsConfig = CropsConfig()
    """What to train on."""
    optim: DinoOptimConfig = DinoOptimConfig()
    """Optimizer and its schedules."""
    head: DinoHeadConfig = DinoHeadConfig()
    """Head of the class tokens, and of the patches where they have none of their own."""
    ibot_head: DinoHeadConfig | None = None
    """Head of the patches; none shares that of the class tokens."""
    loss: DinoLossConfig = DinoLossConfig()
    """Losses."""
    teacher: TeacherConfig = TeacherConfig()
    """Teacher."""

    @property
    def masks(self) -> bool:
        """Whether patches are hidden from the student."""
        return self.loss.ibot > 0 and self.teacher.source is None

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
        if self.steps is not None and self.optim.warmup_steps > self.steps:
            raise InputError(
                f"optim.warmup_steps={self.optim.warmup_steps} of steps={self.steps}; warm up for fewer steps"
            )
        if self.data.local_size % self.model.patch_size:
            raise InputError(
                f"data.local_size={self.data.local_size} is no multiple of model.patch_size={self.model.patch_size}; "
                "give one"
            )
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self.data, name)
            if not 0 < low <= high <= 1:
                raise InputError(f"data.{name}={low} {high}: give two shares of the area, from low to high, at most 1")
        if self.data.jitter[3] > 0.5:
            raise InputError(f"data.jitter: a hue of {self.data.jitter[3]} goes round the circle; give at most 0.5")
        low, high = self.loss.mask_ratios
        if not 0 <= low <= high < 1:
            raise InputError(f"loss.mask_ratios={low} {high}: give two shares of the patches, low and high, below 1")
        if self.strategy != "ddp":
            raise InputError(f"strategy={self.strategy}: student and teacher are copied to every process; use ddp")
        if not self.model.class_token or (self.masks and not self.model.mask_token):
            raise InputError(
                f"model.class_token={self.model.class_token}, model.mask_token={self.model.mask_token}: the losses "
                "need both; set them to true"
            )
        source = self.teacher.source or ""
        if source.startswith(RUNS) and not Path(source).exists():
            raise InputError(
                f"teacher.source={source}: nothing there to distil; train {source.removeprefix(RUNS)} first, or give "
                "--teacher.source FOLDER"
            )
        if self.teacher.source is not None and self.loss.gram:
            raise InputError(f"loss.gram={self.loss.gram} with teacher.source: there is no earlier self to hold to")
        if self.ibot_head is not None and not self.loss.ibot:
            raise InputError("ibot_head with loss.ibot=0: it would learn nothing; set ibot_head to none")
        if not self.loss.dino and not self.loss.ibot:
            raise InputError("loss.dino=0 and loss.ibot=0: there is nothing to learn from; give one of them a weight")
