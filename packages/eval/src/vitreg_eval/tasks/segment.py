"""Linear segmentation from frozen patch tokens."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.data.scenes import TEXTURES
from vitreg_core.features import Backbone

from vitreg_eval.config import SegmentOptions
from vitreg_eval.extract import Extracted, train_and_test
from vitreg_eval.heads import SegmentHead, train_head
from vitreg_eval.metrics import Metric, confusion_matrix, measure, pooled_miou, pooled_pixel_accuracy
from vitreg_eval.results import Outcome

CLASSES = 1 + len(TEXTURES)


def run(backbone: Backbone, options: SegmentOptions, out: Path) -> Outcome:  # noqa: ARG001 (draws nothing)
    """Mean intersection over union over background and object classes, and pixel accuracy, 0 to 1."""
    train, test = train_and_test(backbone, options)
    return Outcome(evaluate(train, test, options), test.data)


def evaluate(train: Extracted, test: Extracted, options: SegmentOptions) -> dict[str, Metric]:
    """Measure on the test set a head trained on the training set, at image resolution."""
    torch.manual_seed(options.seed)
    head = SegmentHead(train.features.patches.shape[-1], CLASSES)
    masks = train.targets["mask"].long()
    train_head(head, train.features.patch_map, masks, F.cross_entropy, steps=options.steps, seed=options.seed)
    confusions = torch.stack(
        [
            confusion_matrix(predicted, mask, CLASSES)
            for predicted, mask in zip(predict(head, test), test.targets["mask"].long(), strict=True)
        ]
    )
    return {
        "miou": measure(confusions, pooled_miou, seed=options.seed),
        "pixel_accuracy": measure(confusions, pooled_pixel_accuracy, seed=options.seed),
    }


@torch.no_grad()
def predict(head: SegmentHead, test: Extracted) -> Tensor:
    """Classes `n height width` of every pixel."""
    size = tuple(test.targets["mask"].shape[-2:])
    return torch.cat([head(part, size).argmax(dim=1) for part in test.features.patch_map.split(64)])
