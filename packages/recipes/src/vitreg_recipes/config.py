"""RunConfig: everything that fixes a training run; TrainConfig is that of runs with labels. Imports no torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from vitreg_core.config import Config, ViTConfig
from vitreg_core.errors import InputError

SCENES = "scenes"
RUNS = "runs/"
"""Where apps/train.py puts the folders of runs, from which fine-tunes start."""
FREE_ON_RESUME = frozenset(
    {"out", "log_every", "save_every", "keep_last", "snapshot_every", "norms_every", "evaluate_every", "trackers"}
    | {"data.workers"}
)
"""Fields that change no weight, and so may change when a run continues."""


class OptimConfig(Config):
    """Optimizer and learning rate; betas are 0.9 and 0.999, epsilon is 1e-8."""

    name: Literal["lamb", "adamw"] = "lamb"
    """LAMB, which clips the gradient to norm 1 inside, or AdamW, which does not clip."""
    lr: PositiveFloat = 4e-3
    """Highest learning rate; it is not scaled by the batch size."""
    weight_decay: NonNegativeFloat = 0.05
    """Decay of all but biases, norms, LayerScale, tokens and positions."""
    schedule: Literal["steps", "epochs"] = "steps"
    """A cosine over the steps, or DeiT-III's: constant within an epoch, and one epoch late."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up, counted within the cosine; for schedule=steps."""
    warmup_epochs: NonNegativeInt = 0
    """Epochs of linear warm-up, counted within the cosine; for schedule=epochs."""
    warmup_lr: NonNegativeFloat = 1e-6
    """Learning rate of the first warm-up step."""
    min_lr: NonNegativeFloat = 1e-5
    """Learning rate at the end of the cosine."""

    @property
    def warmup(self) -> str:
        """The field that warms up, with its value."""
        name = f"warmup_{self.schedule}"
        return f"{name}={getattr(self, name)}"


class RunData(Config):
    """Where batches come from."""

    path: str = SCENES
    """`scenes`, drawn while training; a folder with one sub-folder (or .tar) of images per class (its `train`, if it
    has one); `hub:org/name` for a data set of the Hugging Face hub; or shards, 'path/*.tar' or 'path/*.parquet'."""
    batch_size: PositiveInt = 256
    """Images per step, over all processes."""
    workers: NonNegativeInt = 2
    """Processes that read image files, per training process; any number gives the same pixels. Scenes need none."""


class DataConfig(RunData):
    """What to train on, with labels."""

    label: Literal["class", "relation"] = "class"
    """What to learn of scenes: texture of the main object (6), or that and the shape of the second object (48)."""
    augment: Literal["three", "three_simple_crop", "rand_augment"] = "three"
    """DeiT-III's 3-Augment after a random resized crop, the same after a simple random crop (ImageNet-22k), or
    RandAugment m9 mstd0.5 inc1 after a random resized crop (its fine-tunes)."""
    repeats: PositiveInt = 1
    """Times that an image is seen in a row, each time augmented anew; DeiT-III's repeated augmentation takes 3, and
    calls a third of the images an epoch."""


class MixConfig(Config):
    """Mixing of two images and their labels; where both are on, each batch takes one of them at random."""

    mixup: NonNegativeFloat = 0.8
    """Alpha of Mixup; 0 turns it off."""
    cutmix: NonNegativeFloat = 1.0
    """Alpha of CutMix; 0 turns it off."""

    @property
    def active(self) -> bool:
        """Whether batches are mixed at all."""
        return self.mixup > 0 or self.cutmix > 0


class LossConfig(Config):
    """Loss of the classifier."""

    name: Literal["bce", "ce"] = "bce"
    """Binary cross-entropy, where each class in the mix counts as fully there, or cross-entropy on soft targets."""
    smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Label smoothing; cross-entropy only."""


class ElasticConfig(Config):
    """Registers that a model can be used with or without, and that look at different things."""

    sample: bool = False
    """Whether every step uses only the first R' registers, with R' drawn from 0 to all of them."""
    diversity: NonNegativeFloat = 0.0
    """Weight of the penalty on registers whose attention maps are alike."""
    penalty: Literal["correlation", "orthogonality"] = "correlation"
    """Mean squared correlation, or cosine, between the attention maps of two registers."""


class RunConfig(Config):
    """What every training run has; each signal adds its own."""

    signal: ClassVar[str]
    """Module of `signals` that puts the run together."""
    model: ViTConfig = ViTConfig()
    """Shapes of the model."""
    data: RunData = RunData()
    """What to train on."""
    init: str | None = None
    """Weights to start from, any SOURCE of load_model; the head is new unless it fits the classes."""
    steps: PositiveInt | None = None
    """Optimizer steps of the whole run; or give epochs."""
    epochs: PositiveInt | None = None
    """Passes over the data of the whole run; or give steps."""
    accumulate: PositiveInt = 1
    """Parts that every batch is split into, to fit into memory; the gradient is that of the whole batch."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """How several processes share the work: a copy of the model each, or every block split over all."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Fixes weights, data order, augmentation, mixing and drop path."""
    precision: Literal["fp32", "fp32-fast", "bf16"] = "fp32"
    """Exact float32, faster float32 products, or bfloat16 autocast."""
    save_every: PositiveInt = 500
    """Steps between checkpoints."""
    keep_last: PositiveInt = 2
    """Checkpoints to keep."""
    snapshot_every: PositiveInt | None = None
    """Steps between weights that are never deleted (`snapshots/step_*`), for analyses over training."""
    norms_every: PositiveInt | None = None
    """Steps between measurements of the token norms of a fixed batch."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where to log beside `log.jsonl`."""
    log_every: PositiveInt = 20
    """Steps between lines of the log."""
    out: Path | None = None
    """Folder of the run; none trains without writing anything."""

    @property
    def in_pairs(self) -> bool:
        """Whether the images of a process are taken in pairs."""
        return False

    @property
    def rates(self) -> str:
        """What to change where a loss is not finite, with the present values."""
        raise NotImplementedError

    def check_outputs(self) -> None:
        """Refuse a number of outputs that is not the config's to say.

        Raises:
            InputError: names it.
        """
        if self.model.num_classes:
            raise InputError(
                f"model.num_classes={self.model.num_classes}: the number of classes comes from the data; leave it at 0"
            )

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            InputError: names the fields, their values, and what to do.
        """
        check_length(self)
        self.check_outputs()
        if self.init is not None and self.init.startswith(RUNS) and not Path(self.init).exists():
            raise InputError(
                f"init={self.init}: nothing there to fine-tune; train {self.init.removeprefix(RUNS)} first, or give "
                "--init SOURCE"
            )


class TrainConfig(RunConfig):
    """A training run with labels, as of DeiT-III. The number of classes comes from the data."""

    signal: ClassVar[str] = "classify"
    data: DataConfig = DataConfig()
    """What to train on."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate."""
    mix: MixConfig = MixConfig()
    """Mixing of images."""
    loss: LossConfig = LossConfig()
    """Loss of the classifier."""
    elastic: ElasticConfig = ElasticConfig()
    """Sampling and diversity of registers."""
    ema: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Decay of a moving average of the weights, kept beside them (DeiT-III: 0.99996); none keeps no average."""

    @property
    def in_pairs(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mix.active

    @property
    def rates(self) -> str:
        """What to change where a loss is not finite."""
        return f"lower optim.lr={self.optim.lr}, give a longer optim.{self.optim.warmup}, or use precision=fp32"

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            InputError: names the fields, their values, and what to do.
        """
        super().check()
        check_warmup(self)
        check_rates(self.optim)
        check_registers(self)
        if self.data.label != "class" and self.data.path != SCENES:
            raise InputError(
                f"data.label={self.data.label} with data.path={self.data.path}: only scenes have that; use class"
            )
        if self.loss.name == "bce" and self.loss.smoothing:
            raise InputError(
                f"loss.smoothing={self.loss.smoothing} with loss.name=bce would make every class a target; "
                "set smoothing to 0, or name to ce"
            )
        if self.strategy == "fsdp2" and self.optim.name == "lamb":
            raise InputError(
                "strategy=fsdp2 with optim.name=lamb: LAMB needs the norms of whole tensors, of which every process "
                "holds a part; use strategy=ddp, or optim.name=adamw"
            )


def check_length(config: RunConfig) -> None:
    """Refuse a run without an end, or with two."""
    if (config.steps is None) == (config.epochs is None):
        raise InputError(f"steps={config.steps} and epochs={config.epochs}: give one of them, and none for the other")


def check_warmup(config: TrainConfig) -> None:
    """Refuse a warm-up that outlasts the run, or that its schedule does not read."""
    optim = config.optim
    unread, read = ("warmup_epochs", "warmup_steps") if optim.schedule == "steps" else ("warmup_steps", "warmup_epochs")
    if getattr(optim, unread):
        raise InputError(
            f"optim.{unread}={getattr(optim, unread)} has no effect with optim.schedule={optim.schedule}; "
            f"set it to 0, and give optim.{read}"
        )
    lengths = (("steps", optim.warmup_steps, config.steps), ("epochs", optim.warmup_epochs, config.epochs))
    for unit, warmup, length in lengths:
        if length is not None and warmup > length:
            raise InputError(f"optim.warmup_{unit}={warmup} of {unit}={length}; warm up for fewer {unit}")


def check_rates(optim: OptimConfig) -> None:
    """Refuse a highest learning rate that is not the highest."""
    if max(optim.min_lr, optim.warmup_lr) > optim.lr:
        raise InputError(
            f"optim.lr={optim.lr} is below optim.min_lr={optim.min_lr} or optim.warmup_lr={optim.warmup_lr}; "
            "lr is the highest of the three"
        )


def check_registers(config: TrainConfig) -> None:
    """Refuse to sample or compare registers that are not there."""
    elastic, registers = config.elastic, config.model.registers
    if elastic.sample and not registers:
        raise InputError("elastic.sample=True with model.registers=0: there is nothing to draw from; give registers")
    if elastic.diversity and registers < 2:
        raise InputError(
            f"elastic.diversity={elastic.diversity} with model.registers={registers}: it compares registers; "
            "give at least 2, or set it to 0"
        )


def local_batch(config: RunConfig, processes: int) -> int:
    """Images per step in each process.

    Raises:
        InputError: the batch does not divide by the processes, or a process could not mix its share in pairs.
    """
    size = config.data.batch_size
    if size % processes:
        raise InputError(f"data.batch_size={size} does not divide by {processes} processes; give a multiple")
    if config.in_pairs and (size // processes) % 2:
        raise InputError(
            f"data.batch_size={size} over {processes} processes is odd, and mixing takes pairs; "
            "give an even share, or turn off mix.mixup and mix.cutmix"
        )
    return size // processes


def check_same(config: RunConfig, before: RunConfig) -> None:
    """Refuse to continue a run with another config.

    Raises:
        InputError: names the first field that differs, and both values.
    """
    now, then = dict(flatten(config.model_dump())), dict(flatten(before.model_dump()))
    for name in now:
        if name not in FREE_ON_RESUME and now[name] != then[name]:
            raise InputError(
                f"{config.out}: the run there has {name}={then[name]}, not {now[name]}; "
                "resume with the same value, or give another --out"
            )


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested mappings under its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
