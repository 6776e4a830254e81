"""Runs that match images and texts, as CLIP."""

import math
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import AdamW, Optimizer
from vitreg_core.clip import DualEncoder
from vitreg_core.clip_config import ClipConfig
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_core.weights.clip import load_clip, refuse
from vitreg_core.weights.files import read_tensors, weights_file
from vitreg_core.weights.sources import locate

from vitreg_recipes.build import start_from
from vitreg_recipes.contrast.config import ContrastConfig, ContrastOptimConfig
from vitreg_recipes.contrast.data import open_pairs
from vitreg_recipes.data import Data
from vitreg_recipes.objectives.contrast import Contrast
from vitreg_recipes.optim import set_lr
from vitreg_recipes.parts import Parts, extent


def assemble(config: ContrastConfig, accelerator: Accelerator) -> Parts:
    """Build the parts of a run. The weights start alike in all processes; what follows is drawn apart."""
    data = open_pairs(config)
    set_seed(config.seed)
    model = build(config, data)
    shapes = {"model": model.config.vision.model_dump(), "text": model.config.text.model_dump()}
    config = override(config, shapes)
    set_seed(config.seed, device_specific=True)
    network = accelerator.prepare(model)
    optimizer = accelerator.prepare(make_optimizer(model, config.optim))
    objective = Contrast(network, model, accelerator, config)
    length = extent(config, data, accelerator)
    schedule = ContrastSchedule(config.optim, length.steps)
    return Parts(config, data, model, objective, optimizer, schedule, length)


def build(config: ContrastConfig, data: Data) -> DualEncoder:
    """The dual encoder, new or from `init`, which may hold both towers or the image tower alone.

    Raises:
        InputError: shapes that cannot be built, no such weights, or a tower that could not be saved in the end.
    """
    source = str(config.out or "a run without a folder")
    if config.init is None:
        model = DualEncoder(clip_config(config), data.preprocess, source=source)
    elif has_text(config.init):
        model = from_both(config.init, config)
    else:
        model = from_tower(config.init, config)
    expected = model.visual.preprocess.config
    data.preprocess = override(data.preprocess, {"mean": expected.mean, "std": expected.std})
    model.visual.preprocess.config, model.source = data.preprocess, source
    if config.out is not None:
        refuse(model.config.vision, config.out)
    return model


def clip_config(config: ContrastConfig) -> ClipConfig:
    """Shapes of the dual encoder of a run."""
    return ClipConfig(vision=config.model, text=config.text, bias=config.loss == "siglip")


def has_text(source: str) -> bool:
    """Whether there is a text tower in some weights; presets have none, nor has what is not there."""
    try:
        names = read_tensors(weights_file(locate(source)))
    except InputError:
        return False  # which loading an image tower tells better
    return "token_embedding.weight" in names or "text.token_embedding.weight" in names


def from_both(init: str, config: ContrastConfig) -> DualEncoder:
    """Both towers of a dual encoder. Scale and bias of the logits are new where the other loss trained them.

    Raises:
        InputError: weights that do not fit the run.
    """
    start = load_clip(init)
    visual = start_from(init, config.model, start.visual.config.num_classes)
    model = DualEncoder(
        ClipConfig(vision=visual.config, text=start.config.text, bias=config.loss == "siglip"),
        visual.preprocess.config,
    )
    model.visual, model.text = visual, start.text
    if start.config.bias == model.config.bias:
        model.logit_scale, model.logit_bias = start.logit_scale, start.logit_bias
    return model


def from_tower(init: str, config: ContrastConfig) -> DualEncoder:
    """The image tower of some weights, with a new projection, and a new text tower.

    Raises:
        InputError: no such weights, or weights that do not fit the run.
    """
    tower = start_from(init, config.model, 0)
    vision = override(tower.config, {"num_classes": config.model.num_classes, "head_bias": False})
    model = DualEncoder(clip_config(override(config, {"model": vision.model_dump()})), tower.preprocess.config)
    model.visual.load_state_dict(tower.state_dict(), strict=False)  # all but the projection
    if model.visual.mask_token is not None:
        model.visual.mask_token.requires_grad_(False)  # noqa: FBT003 (torch's; no image here is masked)
    return model


def make_optimizer(model: DualEncoder, config: ContrastOptimConfig) -> Optimizer:
    """AdamW with two groups: decayed, and not decayed."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter, decayed in parameters(model):
        groups[decayed].append(parameter)
    settings: list[dict[str, Any]] = [
        {"params": groups[0], "weight_decay": 0.0},
        {"params": groups[1], "weight_decay": config.weight_decay},
    ]
    return AdamW(settings, lr=config.lr, betas=config.betas, eps=config.epsilon)


def parameters(model: DualEncoder) -> Iterator[tuple[nn.Parameter, bool]]:
    """Every parameter that is trained, and whether it is decayed.

    Class token, registers, biases, norms, LayerScale, and scale and bias of the logits are not. Positions, that of the
    class token among them, token embedding and projections are, as in open_clip.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.requires_grad:
            token = name == "visual.registers.tokens"
            yield parameter, name == "visual.positions.cls" or (parameter.ndim > 1 and not token)


class ContrastSchedule:
    """A linear warm-up from one part of it, then a cosine to 0 over the rest of the run (open_clip's)."""

    def __init__(self, config: ContrastOptimConfig, steps: int) -> None:
        self.peak = config.lr
        self.warmup = min(config.warmup_steps, steps)
        self.steps = steps

    def lr(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup))) / 2

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set the learning rate of a step."""
        set_lr(optimizer, self.lr(step))
