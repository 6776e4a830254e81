"""What changes over a DINOv2 run: learning rate, weight decay, momentum and temperature of the teacher."""

import math

from torch.optim import Optimizer

from vitreg_recipes.dinov2.config import DinoConfig


def cosine(step: int, steps: int, *, base: float, final: float, warmup: int = 0, start: float = 0.0) -> float:
    """A line from `start` to `base`, both reached, in `warmup` steps, then a cosine to `final`."""
    if step >= steps:
        return final
    if step < warmup:
        return start + (base - start) * step / max(warmup - 1, 1)
    return final + (base - final) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def line(step: int, steps: int, start: float, end: float) -> float:
    """A line from `start` to `end`, both reached, in so many steps; `end` after it."""
    return end if step >= steps else start + (end - start) * step / max(steps - 1, 1)


class DinoSchedule:
    """Learning rate and weight decay of every group, by its `lr_scale`, `decayed`, `last_layer` and `backbone`."""

    def __init__(self, config: DinoConfig, steps: int) -> None:
        self.optim = config.optim
        self.peak = config.optim.lr * math.sqrt(config.data.batch_size / 1024)
        """DINOv2 scales the rate with the square root of the images of a step, over 1,024."""
        self.steps = steps

    def lr(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        optim = self.optim
        return cosine(step, self.steps, base=self.peak, final=optim.min_lr, warmup=optim.warmup_steps)

    def weight_decay(self, step: int) -> float:
        """Weight decay of a step."""
        start, end = self.optim.weight_decay
        return cosine(step, self.steps, base=start, final=end)

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set learning rate and decay of every group; prototypes, and perhaps the backbone, rest at the start."""
        lr, decay = self.lr(step), self.weight_decay(step)
        for group in optimizer.param_groups:
            rests = group["last_layer"] and step < self.optim.freeze_last_steps
            rests |= group["backbone"] and step < self.optim.freeze_backbone_steps
            group["lr"] = 0.0 if rests else lr * group["lr_scale"]
            group["weight_decay"] = decay if group["decayed"] else 0.0


def momentum(step: int, steps: int, start: float) -> float:
    """What the teacher keeps of itself at a step: a cosine from `start` to 1."""
    return cosine(step, steps, base=start, final=1.0)
