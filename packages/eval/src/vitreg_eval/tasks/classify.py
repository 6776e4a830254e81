"""Accuracy of a model's own head on labelled images."""

from pathlib import Path

import torch
from vitreg_core.errors import InputError
from vitreg_core.precision import use_precision
from vitreg_core.vit import VisionTransformer

from vitreg_eval.config import ClassifyOptions
from vitreg_eval.datasets import labelled_folder
from vitreg_eval.extract import progress
from vitreg_eval.metrics import measure, top_k
from vitreg_eval.models import Model
from vitreg_eval.paths import data_folder
from vitreg_eval.results import Outcome


@torch.no_grad()
def run(backbone: Model, options: ClassifyOptions, out: Path) -> Outcome:  # noqa: ARG001 (draws nothing)
    """Top-1 and top-5 accuracy, 0 to 1.

    Raises:
        InputError: the model has no head, or the folder more classes than it has outputs.
    """
    if not isinstance(backbone, VisionTransformer):
        raise InputError(f"{backbone.source}: only heads of vitreg's own models are read; run linear")
    image_set = labelled_folder(backbone.preprocess, data_folder(options.data), "", options.batch_size)
    logits, labels = [], []
    with use_precision(options.precision, backbone.device):
        for batch in progress(image_set, "classify"):
            logits.append(backbone.classify(batch.images.to(backbone.device)).float().cpu())
            labels.append(batch.targets["label"])
    scores, truth = torch.cat(logits), torch.cat(labels)
    if int(truth.max()) >= scores.shape[1]:
        raise InputError(
            f"{options.data}: {int(truth.max()) + 1} class folders, the head has {scores.shape[1]} outputs"
        )
    ranks = {f"top{k}": top_k(scores, truth, k) for k in (1, 5) if k <= scores.shape[1]}
    metrics = {name: measure(correct, seed=options.seed) for name, correct in ranks.items()}
    return Outcome(metrics, image_set.data, fewer(int(truth.max()) + 1, scores.shape[1]))


def fewer(folders: int, outputs: int) -> list[str]:
    """What the reader must know where a head names more classes than there are folders."""
    if folders == outputs:
        return []
    return [f"warning: the head has {outputs} outputs; the {folders} class folders are taken for its first ones"]
