"""Linear depth estimation from frozen patch and class tokens."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from vitreg_core.features import Backbone

from vitreg_eval.config import DepthOptions
from vitreg_eval.extract import Extracted, train_and_test
from vitreg_eval.heads import DepthHead, sig_loss, train_head
from vitreg_eval.metrics import Metric, depth_errors, measure
from vitreg_eval.results import Outcome


def run(backbone: Backbone, options: DepthOptions, out: Path) -> Outcome:  # noqa: ARG001 (draws nothing)
    """Root mean square error in metres (mean over images), relative error, and share of pixels within 25 %."""
    train, test = train_and_test(backbone, options)
    return Outcome(evaluate(train, test, options), test.data)


def evaluate(train: Extracted, test: Extracted, options: DepthOptions) -> dict[str, Metric]:
    """Measure on the test set a head trained on the training set, at image resolution."""
    torch.manual_seed(options.seed)
    inputs = tokens_with_cls(train)
    head = DepthHead(inputs.shape[1])
    train_head(head, inputs, train.targets["depth"], sig_loss, steps=options.steps, seed=options.seed)
    size = tuple(test.targets["depth"].shape[-2:])
    with torch.no_grad():
        predicted = torch.cat([head(part, size) for part in tokens_with_cls(test).split(64)])
    errors = depth_errors(predicted, test.targets["depth"])
    return {
        "rmse": measure(errors.rmse, seed=options.seed),
        "abs_rel": measure(errors.abs_rel, seed=options.seed),
        "delta1": measure(errors.delta1, seed=options.seed),
    }


def tokens_with_cls(extracted: Extracted) -> Float[Tensor, "n channels rows cols"]:
    """Patch map with the class token beside every patch."""
    patches = extracted.features.patch_map
    cls = extracted.cls[:, :, None, None].expand(-1, -1, *patches.shape[-2:])
    return torch.cat([patches, cls], dim=1)
