"""Self-supervised runs of DINOv2."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm
from vitreg_core.config import PreprocessConfig, override
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights import load_model
from vitreg_core.weights.files import check_tensors, read_tensors

from vitreg_recipes.build import start_from
from vitreg_recipes.config import local_batch
from vitreg_recipes.dinov2.config import DinoConfig
from vitreg_recipes.dinov2.data import CropData
from vitreg_recipes.dinov2.networks import Network, Student, Teacher
from vitreg_recipes.dinov2.schedules import DinoSchedule
from vitreg_recipes.objectives import Objective
from vitreg_recipes.objectives.accumulate import Accumulate
from vitreg_recipes.objectives.dinov2 import Dinov2, Networks
from vitreg_recipes.parts import Parts, extent

HEADS = "heads.safetensors"
"""What a run leaves beside its model."""
FEW_IMAGES, MANY_PROTOTYPES = 512, 64
"""Images per step, and prototypes for each of them, from which on a batch is too small for its prototypes."""


def assemble(config: DinoConfig, accelerator: Accelerator) -> Parts:
    """Build the parts of a run. Student and teacher start alike, in all processes."""
    check_koleo(config, accelerator.num_processes)
    if accelerator.is_main_process:
        advise(config)
    data = CropData(config)
    set_seed(config.seed)
    backbone = build_backbone(config, data.preprocess)
    config = override(config, {"model": backbone.config.model_dump()})
    networks = build_networks(config, backbone, accelerator.device)
    set_seed(config.seed, device_specific=True)
    network = accelerator.prepare(networks.student)
    optimizer = accelerator.prepare(make_optimizer(networks.student, config))
    length = extent(config, data, accelerator)
    objective: Objective = Dinov2(network, networks, accelerator, config, length.steps)
    if config.accumulate > 1:
        objective = Accumulate(objective, network, accelerator, config.accumulate)
    others: dict[str, nn.Module] = {"student": networks.student, "heads": heads(networks.average)}
    if networks.anchor is not None:
        others["anchor"] = networks.anchor
    schedule = DinoSchedule(config, length.steps)
    return Parts(
        config,
        data,
        networks.average.backbone,
        objective,
        optimizer,
        schedule,
        length,
        others=others,
        exported=("heads",),
    )


def check_koleo(config: DinoConfig, processes: int) -> None:
    """Refuse batches in which no image has another one to keep away from.

    Raises:
        InputError: one image in a process, or in a part of its batch.
    """
    images = local_batch(config, processes) // config.accumulate
    if config.loss.koleo and images < 2:
        raise InputError(
            f"data.batch_size={config.data.batch_size} over {processes} processes and accumulate={config.accumulate} "
            f"leaves {images} image at a time, and KoLeo compares images; give a larger batch, or set loss.koleo to 0"
        )


def advise(config: DinoConfig) -> None:
    """Say that a batch is small for the prototypes, as with the official settings on one GPU."""
    images, prototypes = config.data.batch_size, config.head.prototypes
    if images < FEW_IMAGES and prototypes > MANY_PROTOTYPES * images:
        tqdm.write(
            f"data.batch_size={images} with head.prototypes={prototypes}: settings for thousands of images per step "
            f"hardly learn below {FEW_IMAGES}; dinov2_small has others",
            file=sys.stderr,
        )


def build_backbone(config: DinoConfig, preprocess: PreprocessConfig) -> VisionTransformer:
    """The student's backbone, new or from `init`; without masks its mask token rests."""
    source = str(config.out or "a run without a folder")
    if config.init is None:
        model = VisionTransformer(config.model, preprocess, source=source)
    else:
        model = start_from(config.init, config.model, 0)
        model.preprocess.config, model.source = preprocess, source
    if model.mask_token is not None:
        model.mask_token.requires_grad_(config.masks)
    elif config.masks:
        raise InputError(
            f"init={config.init}: it has no mask token, which the loss on patches needs; give DINOv2 weights"
        )
    return model


def build_networks(config: DinoConfig, backbone: VisionTransformer, device: torch.device) -> Networks:
    """Student, teacher, average and anchor."""
    student = Student(backbone, config).to(device)
    if config.init is not None and (Path(config.init) / HEADS).is_file():
        fill_heads(student, Path(config.init) / HEADS)
    average = frozen(Teacher(without_drop_path(backbone), config)).to(device)
    average.load_state_dict(student.state_dict())
    teacher = average if config.teacher.source is None else load_teacher(config.teacher.source, config).to(device)
    anchor = copy.deepcopy(average.backbone) if config.loss.gram else None
    return Networks(student, teacher, average, anchor)


def without_drop_path(model: VisionTransformer) -> VisionTransformer:
    """A copy of a model that drops nothing."""
    plain = VisionTransformer(override(model.config, {"drop_path": 0.0}), model.preprocess.config, source=model.source)
    plain.load_state_dict(model.state_dict())
    return plain


def frozen(network: Teacher) -> Teacher:
    """The network, in evaluation mode and without gradients."""
    return network.eval().requires_grad_(False)  # noqa: FBT003 (torch's)


def load_teacher(source: str, config: DinoConfig) -> Teacher:
    """A trained model with the heads that its run left beside it.

    Raises:
        InputError: no heads there, or of other sizes.
    """
    teacher = Teacher(load_model(source), config)
    file = Path(source) / HEADS
    if not file.is_file():
        raise InputError(f"teacher.source={source}: no {HEADS} there; give the folder of a DINOv2 run")
    fill_heads(teacher, file)
    return frozen(teacher)


def fill_heads(network: Network, file: Path) -> None:
    """Take the heads that a run left beside its model.

    Raises:
        InputError: they have other sizes.
    """
    tensors = read_tensors(file)
    check_tensors(heads(network).state_dict(), tensors, file, {})
    heads(network).load_state_dict(tensors)


def heads(network: Network) -> nn.ModuleDict:
    """The heads of a network, by name."""
    found = {"dino_head": network.dino_head, "ibot_head": network.ibot_head}
    return nn.ModuleDict({name: head for name, head in found.items() if head is not None})


def make_optimizer(student: Student, config: DinoConfig) -> Optimizer:
    """AdamW over the groups that differ in learning rate or decay."""
    groups: dict[Key, list[nn.Parameter]] = {}
    for parameter, key in keyed(student, config):
        groups.setdefault(key, []).append(parameter)
    settings: list[dict[str, Any]] = [{"params": parameters, **key._asdict()} for key, parameters in groups.items()]
    return AdamW(settings, lr=config.optim.lr, weight_decay=0.0)


class Key(NamedTuple):
    """What parameters of a group have in common."""

    lr_scale: float
    """Factor on the learning rate."""
    decayed: bool
    """Whether weight decay acts on them."""
    last_layer: bool
    """Whether they are prototypes."""
    backbone: bool
    """Whether they are of the backbone."""


def keyed(student: Student, config: DinoConfig) -> Iterator[tuple[nn.Parameter, Key]]:
    """Every parameter with the key of its group.

    Biases, norms and LayerScale do not decay; tokens, positions and both parts of the prototypes do.
    """
    depth = config.model.depth
    for name, parameter in student.named_parameters():
        if not parameter.numel() or not parameter.requires_grad:
            continue
        scale, inside = 1.0, name.removeprefix("backbone.")
        if inside != name:
            scale = config.optim.layer_decay ** (depth + 1 - layer_of(inside, depth))
            scale *= config.optim.patch_embed_lr if inside.startswith("patch_embed.") else 1.0
        decayed = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
        yield parameter, Key(scale, decayed, "last_layer" in name, inside != name)


def layer_of(name: str, depth: int) -> int:
    """0 for what stands before the blocks, then the blocks from 1, and the final norm after them."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1 if name.startswith("norm.") else 0
