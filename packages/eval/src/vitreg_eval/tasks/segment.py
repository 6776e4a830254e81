"""Linear segmentation from frozen patch tokens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from vitreg_core.data.scenes import TEXTURES
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone
from vitreg_core.weights.files import weights_hash

from vitreg_eval.analyses.segments import Segmented, plot_segments
from vitreg_eval.config import SegmentOptions
from vitreg_eval.datasets.examples import Pairs
from vitreg_eval.datasets.masks import MaskSet
from vitreg_eval.datasets.segmentation import open_segmentation
from vitreg_eval.dense import check_aspect, draws, sum_of_processes, this_process, train_head
from vitreg_eval.extract import Extracted, train_and_test
from vitreg_eval.files import save_figure
from vitreg_eval.metrics import (
    Metric,
    class_areas,
    confusion_matrix,
    measure,
    pooled_class_accuracy,
    pooled_miou,
    pooled_pixel_accuracy,
)
from vitreg_eval.prefetch import READERS, in_order
from vitreg_eval.results import Outcome, is_main_process
from vitreg_eval.segment_head import (
    HeadRecord,
    SegmentHead,
    check_model,
    initial_head,
    load_head,
    save_head,
    segment_loss,
    segment_schedule,
)
from vitreg_eval.segment_train import cached_batches, dinov2_batches
from vitreg_eval.segment_views import whole_view
from vitreg_eval.sliding import Segmenter

CLASSES = 1 + len(TEXTURES)
SCENES_STEPS, SCENES_BATCH = 300, 64
STEPS = {"cached": 1000, "dinov2": 40_000}
CROP = 512
RELEASED_CROPS = {4: 640}
"""Of the released heads, by the number of layers: those of one layer have 512, the `ms` heads 640."""
PICTURES, SHOWN = "predictions.png", 6
PROTOCOLS = {
    "cached": "features of one crop of every image, computed once; not comparable with published values",
    "dinov2": "new crops at every step",
}


def run(backbone: Backbone, options: SegmentOptions, out: Path) -> Outcome:
    """Mean IoU, and accuracy over pixels and over classes, 0 to 1.

    Of a data set also head.safetensors with head.json, and predictions.png.
    """
    if options.dataset is None:
        train, test = train_and_test(backbone, options)
        return Outcome(evaluate(train, test, options), test.data)
    data = open_segmentation(options)
    if options.head is None:
        assert data.train is not None
        head, record = fit(backbone, data.train, options, out)
        save_head(head, record, out)
        crop, how = record.crop, f"protocol {options.protocol}: {PROTOCOLS[options.protocol]}; head in {out}"
    else:
        head, record = open_head(backbone, data.test, options.head)
        crop, how = options.crop or record.crop, f"head of {options.head}"
    crop = crop or RELEASED_CROPS.get(len(record.layers), CROP)
    segmenter = Segmenter(backbone, head, record.layers, crop, options.precision, options.batch_size)
    areas, shown = segment_all(segmenter, data.test)
    if is_main_process():
        save_figure(plot_segments(shown, data.test.classes), out / PICTURES)
    notes = [how, f"windows of {crop} px, shorter side {crop} px, measured at the size of the masks"]
    return Outcome(metrics(areas, options.seed), data.test.pairs.data, [*notes, f"pictures in {out / PICTURES}"])


def metrics(areas: Float[Tensor, "n 3 classes"], seed: int) -> dict[str, Metric]:
    """Numbers from the areas of each image."""
    return {
        "miou": measure(areas, pooled_miou, seed=seed),
        "pixel_accuracy": measure(areas, pooled_pixel_accuracy, seed=seed),
        "class_accuracy": measure(areas, pooled_class_accuracy, seed=seed),
    }


# Heads


def fit(backbone: Backbone, train: MaskSet, options: SegmentOptions, out: Path) -> tuple[SegmentHead, HeadRecord]:
    """Train a head by the protocol of the options; a killed training in `out` goes on."""
    record = HeadRecord(
        dataset=train.pairs.data.name,
        classes=train.classes,
        layers=tuple(range(-options.layers, 0)),
        crop=crop_size(options, backbone.patch_size),
        patch_size=backbone.patch_size,
        model=model_hash(backbone),
    )
    head = initial_head(len(record.layers) * backbone.embed_dim, len(train.classes), options.seed).to(backbone.device)
    steps = options.steps or STEPS[options.protocol]
    batches = cached_batches if options.protocol == "cached" else dinov2_batches
    settings = options.model_dump(mode="json", include={"protocol", "batch_size", "precision", "seed"})
    identity = {"record": record.model_dump(mode="json"), "data": train.pairs.data.hash, "steps": steps, **settings}
    train_head(
        head,
        batches(backbone, train.pairs, record, options, steps),
        segment_loss,
        segment_schedule(steps),
        seed=options.seed,
        out=out,
        identity=json.dumps(identity, sort_keys=True),
    )
    return head, record


def crop_size(options: SegmentOptions, patch_size: int) -> int:
    """Side of the crops: as asked, or for cached features the nearest that has whole patches."""
    crop = options.crop or CROP
    if options.protocol == "dinov2":
        return crop  # padded at each step, as DINOv2 does
    return max(1, round(crop / patch_size)) * patch_size


def open_head(backbone: Backbone, test: MaskSet, path: Path) -> tuple[SegmentHead, HeadRecord]:
    """A head from a file, for the model and the data set at hand.

    Raises:
        InputError: it does not fit one of them.
    """
    head, record = load_head(path, backbone.embed_dim, backbone.patch_size)
    check_model(record, path, model_hash(backbone))
    count = head.conv.out_channels
    if count != len(test.classes) or record.classes not in {(), test.classes}:
        raise InputError(
            f"{path}: {count} classes of {record.dataset}, the data has {len(test.classes)} classes of "
            f"{test.pairs.data.name}; give the head of this data set"
        )
    return head.to(backbone.device), record


def model_hash(backbone: Backbone) -> str:
    """Hash of the weights."""
    return weights_hash(cast(nn.Module, backbone))


# Measuring


def segment_all(segmenter: Segmenter, test: MaskSet) -> tuple[Float[Tensor, "n 3 classes"], list[Segmented]]:
    """Areas of every image at the size of its mask, and a few pictures; several processes share the images."""
    count, process = len(test.pairs), this_process()
    areas = torch.zeros(count, 3, len(test.classes), dtype=torch.float64)
    mine = range(process.rank, count, process.size)
    pictured = {mine[index * len(mine) // SHOWN] for index in range(SHOWN)} if mine else set()
    shown = []
    for index, (view, mask) in views(segmenter, test.pairs, mine):
        predicted = segmenter(view, (mask.shape[0], mask.shape[1]))
        areas[index] = class_areas(confusion_matrix(predicted, mask, len(test.classes)))
        if index in pictured:
            picture, _ = test.pairs.read(index)
            shown.append(Segmented(picture, mask.numpy(), predicted.numpy()))
    return sum_of_processes(areas, segmenter.backbone.device), shown


def views(
    segmenter: Segmenter, pairs: Pairs, indices: range
) -> Iterator[tuple[int, tuple[Float[Tensor, "3 height width"], UInt8[Tensor, "label_height label_width"]]]]:
    """Images as they are measured, with their masks, read ahead in threads."""

    def prepare(index: int) -> tuple[Tensor, Tensor]:
        picture, mask = pairs.read(index)
        check_aspect(picture, pairs.names[index])
        return whole_view(picture, segmenter.backbone.preprocess, segmenter.crop), mask

    read = in_order(prepare, indices, threads=READERS, ahead=2 * READERS)
    shown = tqdm(read, total=len(indices), desc="segment", unit="image", disable=None, leave=False)
    yield from zip(indices, shown, strict=True)


# Scenes


def evaluate(train: Extracted, test: Extracted, options: SegmentOptions) -> dict[str, Metric]:
    """Measure on test scenes a head trained on the training scenes, at image resolution."""
    head = initial_head(train.features.patches.shape[-1], CLASSES, options.seed)
    maps, masks, steps = train.features.patch_map, train.targets["mask"], options.steps or SCENES_STEPS

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor([draw.index for draw in draws(len(masks), SCENES_BATCH, options.seed, step)])
        return maps[chosen].float(), masks[chosen]

    train_head(head, batch, segment_loss, segment_schedule(steps), seed=options.seed)
    pairs = zip(predict(head, test), test.targets["mask"], strict=True)
    areas = torch.stack([class_areas(confusion_matrix(predicted, mask, CLASSES)) for predicted, mask in pairs])
    return metrics(areas, options.seed)


@torch.no_grad()
def predict(head: SegmentHead, test: Extracted) -> UInt8[Tensor, "n height width"]:
    """Classes of every pixel."""
    size = tuple(test.targets["mask"].shape[-2:])
    parts = test.features.patch_map.split(64)
    return torch.cat([F.interpolate(head(part.float()), size, mode="bilinear").argmax(dim=1) for part in parts]).byte()
