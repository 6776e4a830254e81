"""Measurements while a run trains: token norms, and evaluations that the caller hands in. They change nothing in it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vitreg_core.errors import InputError
from vitreg_core.outliers import find_outliers, patch_norms
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


class Norms:
    """Every few steps, one line of `norms.jsonl` on the patch tokens after the last block, before the final norm.

    The images are the first of the run, prepared as for training, and the same every time.
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
                self.lines.write(state, self.measure(state, model.eval()))

    def measure(self, state: TrainState, model: nn.Module) -> dict[str, float | None]:
        """Norms of the present model."""
        if self.images is None:
            device = state.accelerator.device
            self.images = next(state.data.batches(0, Share(NORM_IMAGES, 0, 1), device)).images
        tower = model if isinstance(model, VisionTransformer) else model.visual
        assert isinstance(tower, VisionTransformer)
        chunks = self.images.to(tower.device).split(CHUNK)
        found = find_outliers(torch.cat([patch_norms(tower, chunk)[-1] for chunk in chunks]))
        return {
            "median_norm": found.median_norm,
            "max_norm": found.max_norm,
            "outlier_fraction": found.fraction,
            "cutoff": found.cutoff,
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
