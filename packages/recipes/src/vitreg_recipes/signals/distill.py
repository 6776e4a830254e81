"""Runs that add registers to a trained model, by distilling it into itself."""

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm
from vitreg_core.config import override
from vitreg_core.denoise import draw_views
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights import load_model

from vitreg_recipes.data import Share
from vitreg_recipes.distill.config import DistillConfig, DistillOptimConfig
from vitreg_recipes.distill.data import PixelData
from vitreg_recipes.distill.seeds import IMAGES, seed_registers
from vitreg_recipes.objectives import Objective
from vitreg_recipes.objectives.accumulate import Accumulate
from vitreg_recipes.objectives.distill import Distill, Tokens
from vitreg_recipes.parts import Parts, extent

LEARNED = ("registers.tokens", "positions.patches", "positions.cls", "patch_embed.")
"""Names, or how they begin, of what learns beside the last blocks."""


class Pair(NamedTuple):
    """The model of the start, and the same with more registers."""

    teacher: VisionTransformer
    student: VisionTransformer


def assemble(config: DistillConfig, accelerator: Accelerator) -> Parts:
    """Build the parts of a run. The registers start alike in all processes."""
    set_seed(config.seed)
    teacher, student = build(config)
    if accelerator.is_main_process:
        whose = f"as {config.init} reads them" if config.model.image_size is None else "as model.image_size says"
        tqdm.write(f"images of {student.preprocess.config.image_size} pixels, {whose}", file=sys.stderr)
    data = PixelData(config, student.preprocess.config)
    if config.start == "outliers":
        seed(student, data, accelerator, teacher.num_registers)
    config = override(config, {"model": override(student.config, {"num_classes": 0}).model_dump()})
    set_seed(config.seed, device_specific=True)
    network = accelerator.prepare(Tokens(student))
    optimizer = accelerator.prepare(make_optimizer(student, config.optim))
    objective: Objective = Distill(network, teacher.to(accelerator.device), accelerator, config)
    if config.accumulate > 1:
        objective = Accumulate(objective, network, accelerator, config.accumulate)
    length = extent(config, data, accelerator)
    return Parts(config, data, student, objective, optimizer, DistillSchedule(config.optim, length.steps), length)


def seed(student: VisionTransformer, data: PixelData, accelerator: Accelerator, old: int) -> None:
    """Start the new registers as outlier patches of the first images of the run, the same in all processes."""
    images = next(data.batches(0, Share(IMAGES, 0, 1), accelerator.device)).images
    found = seed_registers(student.to(accelerator.device).eval(), images, old)
    if not found and accelerator.is_main_process:
        tqdm.write(f"no outliers among the patches of {IMAGES} images: new registers start at random", file=sys.stderr)


def build(config: DistillConfig) -> Pair:
    """Load the model of the start, and make the one that learns: its weights and its head, with new registers.

    Raises:
        InputError: no model to start from, no such weights, a model with test-time registers or that already has as
            many, fewer blocks than shall learn, or images that cannot be shifted.
    """
    if config.init is None:
        raise InputError("init=None: registers are added to a trained model; give --init SOURCE")
    teacher = load_model(config.init)
    if teacher.config.moved is not None:
        raise InputError(f"init={config.init} has test-time registers; give the model that they were added to")
    there, wanted = teacher.num_registers, config.model.registers
    if wanted <= there:
        raise InputError(
            f"model.registers={wanted} with init={config.init}, which has {there} already; give "
            f"--model.registers {there + 4} to add four"
        )
    if config.last_blocks > teacher.depth:
        raise InputError(
            f"last_blocks={config.last_blocks} with init={config.init}, which has {teacher.depth} blocks; give "
            f"--last_blocks {teacher.depth}"
        )
    side = find_side(teacher, config)
    if teacher.config.size != (side, side):
        teacher.set_input_size(side)
    draw_views(teacher.config.grid)  # which refuses a single patch
    teacher.preprocess.config = override(teacher.preprocess.config, {"image_size": side})
    student = with_new_registers(teacher, config)
    choose(student, config.last_blocks)
    return Pair(teacher.requires_grad_(False).eval(), student)  # noqa: FBT003 (torch's)


def find_side(teacher: VisionTransformer, config: DistillConfig) -> int:
    """Side in pixels of the images of a run: the one given, or that of the model of the start.

    Raises:
        InputError: none is given, and the model reads images that are no squares.
    """
    if config.model.image_size is not None:
        return max(config.model.size)
    height, width = teacher.config.size
    if height != width:
        raise InputError(
            f"init={config.init} reads images of {height}x{width} pixels, and crops are square; give "
            f"--model.image_size {max(height, width)}"
        )
    return height


def with_new_registers(model: VisionTransformer, config: DistillConfig) -> VisionTransformer:
    """A copy of a model with new random registers behind those that it has."""
    wanted = config.model
    changes = {"registers": wanted.registers, "register_std": wanted.register_std, "drop_path": wanted.drop_path}
    source = str(config.out or "a run without a folder")
    copy = VisionTransformer(override(model.config, changes), model.preprocess.config, source=source)
    tensors = model.state_dict()
    new = copy.registers.tokens.detach()[model.num_registers :]
    copy.load_state_dict({**tensors, "registers.tokens": torch.cat([tensors["registers.tokens"], new])})
    return copy


def choose(model: VisionTransformer, last_blocks: int) -> None:
    """Freeze all but registers, positions, patch embedding and the last blocks."""
    blocks = tuple(f"blocks.{index}." for index in range(model.depth - last_blocks, model.depth))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith((*LEARNED, *blocks)))


def make_optimizer(model: VisionTransformer, config: DistillOptimConfig) -> Optimizer:
    """AdamW over what learns, in groups that differ in learning rate or decay."""
    groups: dict[Key, list[nn.Parameter]] = {}
    for parameter, key in learned(model, config):
        groups.setdefault(key, []).append(parameter)
    settings: list[dict[str, Any]] = [{"params": parameters, **key._asdict()} for key, parameters in groups.items()]
    return AdamW(settings, lr=config.lr)


class Key(NamedTuple):
    """What parameters of a group have in common."""

    lr_scale: float
    """Factor on the learning rate."""
    weight_decay: float
    """Decay."""


def learned(model: VisionTransformer, config: DistillOptimConfig) -> Iterator[tuple[nn.Parameter, Key]]:
    """Every parameter that learns, with the key of its group; tokens and positions, biases, norms do not decay."""
    tokens = model.no_weight_decay()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name not in tokens
            yield parameter, Key(1.0 if name in tokens else config.weights_lr, config.weight_decay * decayed)


class DistillSchedule:
    """A linear warm-up, then a cosine to the lowest learning rate over the rest of the run."""

    def __init__(self, config: DistillOptimConfig, steps: int) -> None:
        self.config = config
        self.steps = steps

    def lr(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        high, low, warmup = self.config.lr, self.config.min_lr, self.config.warmup_steps
        if step < warmup:
            return high * (step + 1) / warmup
        return low + (high - low) * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup))) / 2

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set the learning rate of a step in every group."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr(step) * group["lr_scale"]
