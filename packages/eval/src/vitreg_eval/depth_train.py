"""Training a depth head on frozen features: of resized images, computed once, or of new crops at every step."""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from vitreg_core.features import Backbone

from vitreg_eval.config import DepthOptions
from vitreg_eval.datasets import Batch, ImageSet, grouped, prepared
from vitreg_eval.datasets.depth_files import DepthSet
from vitreg_eval.dense import Draw, HeadSchedule, draws, pad_to_multiple, train_head
from vitreg_eval.depth_augment import KITTI, NYU, OTHER, augment, learning_rate, momentum
from vitreg_eval.depth_head import (
    UPSAMPLE,
    DepthHead,
    HeadRecord,
    TrainedHead,
    build_head,
    head_layers,
    join_maps,
    model_hash,
    resize_depth,
    sig_loss,
)
from vitreg_eval.depth_predict import class_token, depth_features, fitted_size, model_input, nearest_depth
from vitreg_eval.extract import Extracted, Wanted, extract

BATCH = 16
"""Images of a step, as in DINOv2's protocol."""
WARM_UP = 100
"""Steps in which the loss leaves the variance out, or a tenth of all if that is less."""
CACHED_LR = 3e-3
SAVE_EVERY = 200
"""Steps after which a training is written down, so that it can go on when killed."""
STEPS = {"cached": 500, "dinov2": 38_400}
RECIPES = {"nyu": NYU, "kitti": KITTI}

Batches = Callable[[int], tuple[Tensor, Tensor]]


def fit_depth(backbone: Backbone, data: DepthSet, options: DepthOptions, out: Path) -> TrainedHead:
    """Train a head by the protocol of the options; a killed training in `out` goes on.

    Raises:
        InputError: the images or the model do not fit the protocol, or the head diverges.
    """
    layers = head_layers(options.layers, backbone.depth)
    record = HeadRecord(
        layers=layers,
        channels=2 * len(layers) * backbone.embed_dim,
        max_depth=data.max_depth,
        model_hash=model_hash(backbone),
    )
    steps = options.steps or STEPS[options.protocol]
    if options.protocol == "cached":
        batches, schedule = cached_batches(backbone, data, record, options), cached_schedule(steps)
    else:
        batches, schedule = dinov2_batches(backbone, data, record, options), dinov2_schedule(steps)
    identity = {"record": record.model_dump(mode="json"), "data": data.pairs.data.hash, "steps": steps}
    identity |= {
        name: getattr(options, name)
        for name in ("dataset", "protocol", "image_size", "precision", "seed", "depth_scale")
    }
    torch.manual_seed(options.seed)
    head = build_head(record).to(backbone.device)
    fit(head, batches, schedule, options.seed, out, json.dumps(identity, sort_keys=True))
    return TrainedHead(head, record)


def fit_extracted(found: Extracted, record: HeadRecord, schedule: HeadSchedule, seed: int) -> TrainedHead:
    """Train a head on features and depth that are in memory."""
    torch.manual_seed(seed)
    head = build_head(record)
    fit(head, batches_of(found, seed, torch.device("cpu")), schedule, seed)
    return TrainedHead(head, record)


def fit(
    head: DepthHead, batches: Batches, schedule: HeadSchedule, seed: int, out: Path | None = None, identity: str = ""
) -> None:
    """Train a head on batches of features and depth."""
    loss = partial(depth_loss, head.bins[-1].item(), min(WARM_UP, schedule.steps // 10))
    train_head(head, batches, loss, schedule, seed=seed, out=out, identity=identity)


def depth_loss(
    max_depth: float,
    warm_up: int,
    predicted: Float[Tensor, "b rows cols"],
    depth: Float[Tensor, "b height width"],
    step: int,
) -> Float[Tensor, ""]:
    """Loss of depth enlarged to the size of the true one."""
    return sig_loss(resize_depth(predicted, (depth.shape[1], depth.shape[2])), depth, max_depth, warm_up=step < warm_up)


# Features once


def cached_schedule(steps: int) -> HeadSchedule:
    """AdamW from 3e-3 to 0 along a cosine."""
    return HeadSchedule(
        steps, lambda step: CACHED_LR * 0.5 * (1 + math.cos(math.pi * step / steps)), save_every=SAVE_EVERY
    )


def cached_batches(backbone: Backbone, data: DepthSet, record: HeadRecord, options: DepthOptions) -> Batches:
    """Features of all images, computed once, and depth at the four times finer grid that the head answers on."""
    images = resized_set(backbone, data, options)
    found = extract(backbone, images, options, Wanted(record.layers, norm=record.norm, parts=("cls", "patches")))
    return batches_of(found, options.seed, backbone.device)


def batches_of(found: Extracted, seed: int, device: torch.device) -> Batches:
    """Random images of an extraction: features and depth."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor([draw.index for draw in draws(len(found), BATCH, seed, step)])
        return extracted_maps(found, chosen).to(device), found.targets["depth"][chosen].to(device)

    return batch


def extracted_maps(found: Extracted, chosen: Int[Tensor, " b"]) -> Float[Tensor, "b channels rows cols"]:
    """What a head reads of some images."""
    patches = rearrange(found.parts["patches"][chosen].float(), "b l (r c) d -> b l d r c", r=found.grid[0])
    return join_maps(patches, class_token(found.parts.get("cls"))[chosen].float())


def resized_set(backbone: Backbone, data: DepthSet, options: DepthOptions) -> ImageSet:
    """Images in whole patches, all at the size that fits the first; target: depth, four values for each patch side."""
    first, _ = data.pairs.read(0)
    size = fitted_size(backbone, (first.height, first.width), options)
    rows, cols = (side // backbone.patch_size * UPSAMPLE for side in size)

    def prepare(index: int) -> tuple[Tensor, Tensor]:
        image, depth = data.pairs.read(index)
        return model_input(backbone, image, size), nearest_depth(depth, (rows, cols))

    def part(start: int, stop: int) -> Iterator[Batch]:
        for pairs in grouped(prepare, start, stop, options.batch_size):
            images, depths = zip(*pairs, strict=True)
            yield Batch(torch.stack(images), {"depth": torch.stack(depths)})

    known = {**prepared(backbone.preprocess), "size": list(size), "depth": [rows, cols], "scale": options.depth_scale}
    return ImageSet(data.pairs.data, part, known)


# New crops at every step


def dinov2_schedule(steps: int) -> HeadSchedule:
    """AdamW as in the protocol of DINOv2: a third of the steps to rise, and the momentum against it."""
    return HeadSchedule(
        steps,
        lambda step: learning_rate(step, steps),
        weight_decay=1e-4,
        betas=lambda step: (momentum(step, steps), 0.99),
        grad_clip=35.0,
        save_every=SAVE_EVERY,
    )


def dinov2_batches(backbone: Backbone, data: DepthSet, record: HeadRecord, options: DepthOptions) -> Batches:
    """Random crops, and what a head reads of them at this step; depth is padded as images are, without readings."""
    recipe = RECIPES.get(options.dataset or "", OTHER)

    def prepare(draw: Draw) -> tuple[Tensor, Tensor]:
        pixels, depth = augment(*data.pairs.read(draw.index), recipe, draw.seed)
        return backbone.preprocess.normalize(pixels), depth

    def batch(step: int) -> tuple[Tensor, Tensor]:
        pairs = [prepare(draw) for draw in draws(len(data.pairs), BATCH, options.seed, step)]
        images, depths = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        features = depth_features(backbone, images, record, options.precision)
        return features, pad_to_multiple(depths[:, None], backbone.patch_size)[:, 0].to(features.device)

    return batch
