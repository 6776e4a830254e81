"""What a run needs on GPUs: memory, time and cores, counted by `model_cost`; assumptions are fields with a value."""

from itertools import pairwise
from typing import Literal, NamedTuple

from pydantic import Field, PositiveFloat, PositiveInt
from vitreg_core.config import Config, override
from vitreg_core.errors import InputError

from vitreg_recipes.config import RunConfig, TrainConfig
from vitreg_recipes.dinov2.config import DinoConfig, DinoHeadConfig


class Gpu(NamedTuple):
    """What the maker states."""

    teraflops: float
    """Dense bfloat16 matrix products, in 1e12 operations per second."""
    gigabytes: float
    """Memory, in 1e9 bytes."""


GPUS = {
    "a100": Gpu(312, 80),
    "h100": Gpu(989, 80),
    "h200": Gpu(989, 141),
    "l40s": Gpu(362, 48),
    "rtx4090": Gpu(165, 24),
}
DATA_SETS = {"imagenet": (1_281_167, 1000), "imagenet22k": (14_197_122, 21_841)}
"""Images and classes of what the runs name as their data."""
BF16_SHARE = 0.55
"""What bfloat16 autocast keeps for the backward pass, over float32: norms and the residual stream stay float32."""
LOGIT = 8
"""Bytes of a logit of the student and of its target, in float32."""
TRAINING = 3
"""Operations of forward and backward pass over those of the forward pass."""


class Hardware(Config):
    """What to train on, and what to expect of it."""

    gpu: Literal["a100", "h100", "h200", "l40s", "rtx4090"] = "h100"
    """Kind of GPU."""
    gpus: PositiveInt = 8
    """Number of GPUs, over all machines."""
    mfu: float = Field(default=0.35, gt=0.0, le=1.0)
    """Share of the GPU's bfloat16 peak that training reaches, waiting and communication included; an assumption."""
    reserve: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the memory left to CUDA, its libraries and fragmentation; an assumption."""
    core_rate: PositiveFloat = 16.0
    """Images per second that one CPU core reads and augments; an assumption (60 ms for 3-Augment at 224 px)."""
    images: PositiveInt | None = None
    """Images of the data; those of ImageNet-1k and ImageNet-22k are known."""
    classes: PositiveInt | None = None
    """Classes of the data; those of ImageNet-1k and ImageNet-22k are known."""


class Plan(NamedTuple):
    """What a run needs, in bfloat16 autocast with float32 weights."""

    parameters: int
    """Numbers that the model learns, head included."""
    flops: int
    """Operations of one image, forward and backward."""
    images: int
    """Images seen, repeated ones each time."""
    steps: int
    """Optimizer steps."""
    fixed_bytes: int
    """Memory on each GPU for weights, gradients and optimizer, whatever the batch."""
    image_bytes: int
    """Memory on a GPU for what the backward pass needs of each image."""
    room: int
    """Images that fit on a GPU at once; 0 when not even the model does."""
    share: int
    """Images per step on a GPU."""
    accumulate: int
    """Parts that the share must be split into; 0 when not even one image fits."""
    images_per_second: float
    """Over all GPUs."""
    days: float
    """Time of the whole run."""
    cores: int
    """CPU cores that keep up with the GPUs, over all machines."""


class Work(NamedTuple):
    """What a signal asks of a GPU."""

    parameters: int
    """Numbers that are learned."""
    flops: int
    """Operations of one image, forward and backward."""
    fixed_bytes: int
    """Memory for weights, gradients and optimizer."""
    image_bytes: int
    """Memory for what the backward pass needs of each image."""
    unit: int
    """Images that must stay together."""


def plan(config: RunConfig, hardware: Hardware) -> Plan:
    """Count what a run needs.

    Raises:
        InputError: a signal without counts, data of unknown size, a batch that does not divide by the GPUs, or a model
            that cannot be built.
    """
    known = DATA_SETS.get(config.data.path, (None, None))
    steps = length(config, hardware.images or known[0])
    batch, gpu = config.data.batch_size, GPUS[hardware.gpu]
    if batch % hardware.gpus:
        raise InputError(f"data.batch_size={batch} does not divide by gpus={hardware.gpus}; give a divisor")
    if isinstance(config, TrainConfig):
        work = supervised(config, hardware, hardware.classes or known[1])
    elif isinstance(config, DinoConfig):
        work = self_supervised(config)
    else:
        raise InputError(f"costs are counted for the runs deit3_... and dino..., not for a {type(config).__name__}")
    room = max(0, int((gpu.gigabytes * 1e9 * (1 - hardware.reserve) - work.fixed_bytes) // work.image_bytes))
    share = batch // hardware.gpus
    rate = hardware.gpus * gpu.teraflops * 1e12 * hardware.mfu / work.flops
    return Plan(
        parameters=work.parameters,
        flops=work.flops,
        images=steps * batch,
        steps=steps,
        fixed_bytes=work.fixed_bytes,
        image_bytes=work.image_bytes,
        room=room,
        share=share,
        accumulate=parts(work.unit, share, room),
        images_per_second=rate,
        days=steps * batch / rate / 86_400,
        cores=-int(-rate // hardware.core_rate),
    )


def supervised(config: TrainConfig, hardware: Hardware, classes: int | None) -> Work:
    """Work of a run with labels.

    Raises:
        InputError: the number of classes is not known.
    """
    from vitreg_core.cost import model_cost  # not above: options are checked before torch is there

    if classes is None:
        raise InputError(f"data.path={config.data.path}: give the number of classes (--classes N)")
    cost = model_cost(override(config.model, {"num_classes": classes}))
    return Work(
        parameters=cost.parameters,
        flops=TRAINING * cost.flops,
        fixed_bytes=cost.parameters * parameter_bytes(config, hardware.gpus),
        image_bytes=round(cost.training_bytes * BF16_SHARE),
        unit=2 if config.mix.active else 1,
    )


def self_supervised(config: DinoConfig) -> Work:
    """Work of student and teacher: the student on all crops, the teacher on the global ones; heads included.

    Beside weight, gradient and moments (16 bytes), copies for autocast (2) and of AdamW's update, or what DDP sends (4)
    there is the teacher (4). Logits are kept in float32, of student and teacher; KoLeo needs two images. A teacher that
    is distilled counts as a model of the student's size.
    """
    from vitreg_core.cost import model_cost

    large = model_cost(config.model)
    small = model_cost(config.model, config.data.local_size)
    heads = [config.head, *([config.ibot_head] if config.ibot_head else [])]
    learned = large.parameters + sum(head_weights(config.model.embed_dim, head) for head in heads)
    kept = 2 * large.training_bytes + config.data.local_crops * small.training_bytes
    logits = cls_rows(config) * heads[0].prototypes + patch_rows(config) * heads[-1].prototypes
    return Work(
        parameters=learned,
        flops=step_flops(config),
        fixed_bytes=learned * (16 + 4 + 2 + 4),
        image_bytes=round(kept * BF16_SHARE) + LOGIT * logits,
        unit=2 if config.loss.koleo else 1,
    )


def step_flops(config: DinoConfig) -> int:
    """Operations of one image: student forward and backward on all crops, teacher forward on the global ones."""
    from vitreg_core.cost import model_cost

    large, small = model_cost(config.model).flops, model_cost(config.model, config.data.local_size).flops
    width, cls, patches = config.model.embed_dim, cls_rows(config), patch_rows(config)
    one, other = (2 * head_weights(width, head) for head in (config.head, config.ibot_head or config.head))
    student = 2 * large + config.data.local_crops * small + cls * one + patches * other
    teacher = 2 * large + 2 * one + patches * other
    return TRAINING * student + teacher


def cls_rows(config: DinoConfig) -> int:
    """Class tokens of an image that pass the student's head."""
    return 2 + config.data.local_crops


def patch_rows(config: DinoConfig) -> int:
    """Patches of an image that pass a head, on average."""
    patches = 2 * config.model.grid[0] * config.model.grid[1]
    if config.teacher.source is not None:
        return patches
    return round(patches * config.loss.mask_share * sum(config.loss.mask_ratios) / 2) if config.masks else 0


def head_weights(width: int, head: DinoHeadConfig) -> int:
    """Weights of the matrix products of a head; each counts two operations per row."""
    widths = [width, *[head.hidden] * (head.layers - 1), head.bottleneck, head.prototypes]
    return sum(before * after for before, after in pairwise(widths))


def length(config: RunConfig, images: int | None) -> int:
    """Optimizer steps of a run.

    Raises:
        InputError: epochs of data whose size is not known.
    """
    if config.steps is not None:
        return config.steps
    if images is None or config.epochs is None:
        raise InputError(f"data.path={config.data.path}: give the number of images (--images N)")
    return config.epochs * (images // config.data.batch_size)


def parameter_bytes(config: TrainConfig, gpus: int) -> int:
    """Memory per parameter on each GPU.

    Weight 4, gradient 4, first and second moment 8; moving average 4; copy in bfloat16 for autocast 2; what DDP sends
    4, or of AdamW's update 4. With fsdp2 the lasting part is split over the GPUs.
    """
    lasting = 16 + (4 if config.ema else 0)
    if config.strategy == "fsdp2":
        return -(-lasting // gpus) + 6
    sent = 4 if gpus > 1 else 0
    return lasting + 2 + max(sent, 4 if config.optim.name == "adamw" else 0)


def parts(unit: int, share: int, room: int) -> int:
    """The fewest equal parts of a share that fit, each of a multiple of `unit` images."""
    fitting = (count for count in range(1, share // unit + 1) if share % (count * unit) == 0 and share // count <= room)
    return next(fitting, 0)
