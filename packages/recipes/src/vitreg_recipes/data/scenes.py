"""Drawn scenes as training data."""

from collections.abc import Iterator
from itertools import count

import torch
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import Preprocess
from vitreg_core.data.scenes import SHAPES, TEXTURES, draw_scenes
from vitreg_core.errors import InputError

from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data.batch import Batch, Share

EPOCH = 1000
"""Steps that count as an epoch where there is no end."""


class SceneData:
    """Drawn scenes, each seen once. They are not augmented: a flip would falsify what captions say of them.

    Raises:
        InputError: scenes were asked to be repeated.
    """

    def __init__(self, config: TrainConfig) -> None:
        if config.data.repeats > 1:
            raise InputError(
                f"data.repeats={config.data.repeats} with data.path={config.data.path}: every scene is drawn once; "
                "set repeats to 1"
            )
        self.label = config.data.label
        pairs = [f"{texture}, {shape}" for texture in TEXTURES for shape in SHAPES]
        self.classes = pairs if self.label == "relation" else list(TEXTURES)
        self.images = 0
        self.skipped: set[str] = set()
        size = config.model.image_size
        self.preprocess = PreprocessConfig(image_size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        self.seed = config.seed

    def epoch_steps(self, share: Share) -> int:  # noqa: ARG002 (the same for all)
        """A fixed number, since scenes have no end."""
        return EPOCH

    def batches(self, step: int, share: Share, device: torch.device) -> Iterator[Batch]:
        """Draw batches without end, from a step on."""
        preprocess = Preprocess(self.preprocess)
        for number in count(step):
            seed = (self.seed, number, share.process)
            scenes = draw_scenes(share.size, seed, image_size=self.preprocess.image_size, device=device)
            labels = scenes.relation if self.label == "relation" else scenes.label
            yield Batch(preprocess.normalize(scenes.image), labels)
