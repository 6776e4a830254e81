"""Parameter groups, optimizers and the learning rate of a step."""

import math
from typing import Any

from timm.optim import Lamb
from torch import nn
from torch.optim import AdamW, Optimizer
from vitreg_core.vit import VisionTransformer

from vitreg_recipes.config import OptimConfig

EPSILON = 1e-8  # DeiT-III's script overrides apex's 1e-6


def parameter_groups(model: VisionTransformer, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters in two: not decayed, and decayed.

    Biases, norms, LayerScale and the names in `no_weight_decay()` (tokens and positions, of any shape) are not decayed.
    Empty parameters, such as those of 0 registers, are left out.
    """
    spared = model.no_weight_decay()
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.numel():
            groups[parameter.ndim > 1 and name not in spared].append(parameter)
    return [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": weight_decay}]


def make_optimizer(model: VisionTransformer, config: OptimConfig) -> Optimizer:
    """LAMB as DeiT-III uses it (apex's FusedLAMB: clips the whole gradient to norm 1 inside), or AdamW."""
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "lamb":
        return Lamb(groups, lr=config.lr, eps=EPSILON, max_grad_norm=1.0)
    return AdamW(groups, lr=config.lr, eps=EPSILON)


def lr_at(step: int, config: OptimConfig, steps: int, epoch_steps: int) -> float:
    """Learning rate of a step.

    Args:
        step: from 0.
        config: schedule `steps` follows the curve step by step; `epochs` as DeiT-III's script does: constant within an
            epoch, and one epoch late, since the script steps its scheduler after each epoch with the number of that
            epoch. So the epochs 0 and 1 are trained alike.
        steps: of the whole run.
        epoch_steps: steps of an epoch; of no effect for schedule `steps`.
    """
    if config.schedule == "steps":
        return warmed_cosine(step, config.warmup_steps, steps, config)
    return warmed_cosine(max(step // epoch_steps - 1, 0), config.warmup_epochs, math.ceil(steps / epoch_steps), config)


def warmed_cosine(time: int, warmup: int, length: int, config: OptimConfig) -> float:
    """Linear warm-up from `warmup_lr`, then a cosine to `min_lr`, within whose length the warm-up counts (DeiT-III)."""
    if time < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * time / warmup
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * time / length)) / 2


class CosineSchedule:
    """The learning rate of `lr_at` for every group."""

    def __init__(self, config: OptimConfig, steps: int, epoch_steps: int) -> None:
        self.config = config
        self.steps = steps
        self.epoch_steps = epoch_steps

    def lr(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        return lr_at(step, self.config, self.steps, self.epoch_steps)

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set the learning rate of a step."""
        set_lr(optimizer, self.lr(step))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
