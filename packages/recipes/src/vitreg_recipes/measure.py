"""Measurements while a run trains: token norms, and evaluations that the caller hands in. They change nothing in it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vitreg_core.errors import InputError
from vitreg_core.outliers import find_outliers
from vitreg_core.vit import VisionTransformer

from vitreg_recipes.data import Share
from vitreg_recipes.lines import Lines
from vitreg_recipes.state import TrainState, undisturbed

Evaluation = Callable[[Any], Mapping[str, float]]
"""Named numbers of the model of a run, in evaluation mode."""
NORM_IMAGES = 64
"""Images whose token norms are followed: enough for the mixture rule of find_outliers from 7 x 7 patches on."""
CHUNK = 16
"""Images that pass the model at a time, as the tokens of all blocks are kept."""


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
"""Of the patch norms, in the line of a measurement."""


class Norms:
    """Every few steps, one line of `norms.jsonl` on the tokens after the last block, before the final norm.

    Verdict, quantiles and registers of the model, and where a student is trained beside it the same of that, as
    `student_...` (registers paper, Fig. 4b). The images are the first of the run, prepared as for training, and the
    same every time.
    """

    def __init__(self, state: TrainState) -> None:
        self.lines = Lines(state, "norms.jsonl", "norms/")
        self.images: Tensor | None = None

    def __call__(self, state: TrainState, _metrics: Mapping[str, Tensor]) -> None:
        """Measure where it is due."""
        every = state.config.norms_every
        if every is None or state.step % every:
            return
        model = state.models().get("model")
        if model is not None and state.accelerator.is_main_process:
            with undisturbed(state):
                self.lines.write(state, self.measure(state, model))

    def measure(self, state: TrainState, model: nn.Module) -> dict[str, float | None]:
        """Norms of the present model, and of its student."""
        if self.images is None:
            device = state.accelerator.device
            self.images = next(state.data.batches(0, Share(NORM_IMAGES, 0, 1), device)).images
        found = norms_of(tower(model), self.images)
        student = state.others.get("student")
        if student is None:
            return found
        training, backbone = student.training, student.backbone
        assert isinstance(backbone, VisionTransformer)
        theirs = norms_of(backbone, self.images)
        student.train(training)
        return found | {f"student_{name}": value for name, value in theirs.items()}


def tower(model: nn.Module) -> VisionTransformer:
    """The vision transformer of a model."""
    found = model if isinstance(model, VisionTransformer) else model.visual
    assert isinstance(found, VisionTransformer)
    return found


@torch.no_grad()
def norms_of(model: VisionTransformer, images: Tensor) -> dict[str, float | None]:
    """Verdict on outliers among the patches of some images, and quantiles of their norms and of the registers'."""
    model.eval()
    chunks = images.to(model.device).split(CHUNK)
    last = [model.intermediate(chunk, [-1], norm=False)[0] for chunk in chunks]
    patches = torch.cat([part.patches.float().norm(dim=-1) for part in last])
    registers = torch.cat([part.registers.float().norm(dim=-1) for part in last])
    found = find_outliers(patches)
    cuts = patches.flatten().quantile(patches.new_tensor(QUANTILES)).tolist()
    return {
        "outliers": float(found.found),
        "median_norm": found.median_norm,
        "max_norm": found.max_norm,
        "outlier_fraction": found.fraction,
        "cutoff": found.cutoff,
        **{f"q{round(100 * share):02}": cut for share, cut in zip(QUANTILES, cuts, strict=True)},
        "register_mean": registers.mean().item() if registers.numel() else None,
        "register_max": registers.max().item() if registers.numel() else None,
    }


class Evaluate:
    """Every few steps and at the end, one line of `evaluations.jsonl`; of the moving average as well, as `ema_...`."""

    def __init__(self, state: TrainState, evaluations: Mapping[str, Evaluation]) -> None:
        self.evaluations = evaluations
        self.lines = Lines(state, "evaluations.jsonl", "evaluations/")
        self.last: dict[str, float] = {}
        """The newest line."""
        if state.config.evaluate_every is not None and not evaluations:
            raise InputError(
                f"evaluate_every={state.config.evaluate_every} without evaluations; give train some, as apps/train.py "
                "does, or set it to none"
            )

    def __call__(self, state: TrainState, _metrics: Mapping[str, Tensor]) -> None:
        """Evaluate where it is due."""
        every = state.config.evaluate_every
        if every is None or (state.step % every and state.step != state.steps):
            return
        models = state.models()
        if state.accelerator.is_main_process:
            with undisturbed(state):
                self.last = {
                    f"{'' if kind == 'model' else f'{kind}_'}{name}_{metric}": value
                    for kind, model in models.items()
                    for name, evaluation in self.evaluations.items()
                    for metric, value in evaluation(model.eval()).items()
                }
            self.lines.write(state, self.last)
