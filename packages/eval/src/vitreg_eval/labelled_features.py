"""Features of the training and the evaluation set that the options of a classification task name."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from vitreg_core.data.images import Preprocess
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone

from vitreg_eval.config import LabelOptions
from vitreg_eval.datasets import image_set
from vitreg_eval.datasets.labelled import open_splits
from vitreg_eval.extract import Extracted, extract, train_and_test
from vitreg_eval.tokens import Wanted

CLASS_TOKENS = Wanted()
"""The class token of the last layer."""


@dataclass(frozen=True)
class LabelledFeatures:
    """Features to fit on and to report on."""

    train: Extracted
    test: Extracted
    classes: int
    notes: list[str]
    """What the reader must know of the images."""


def labelled_features(
    backbone: Backbone, options: LabelOptions, wanted: Wanted = CLASS_TOKENS, preprocess: Preprocess | None = None
) -> LabelledFeatures:
    """Extract both sets, or read what `options.cache` keeps.

    Args:
        backbone: in evaluation mode.
        options: name the images.
        wanted: what to keep of every image.
        preprocess: in place of the backbone's own, for photos.

    Raises:
        InputError: as `open_splits` and `extract`.
    """
    if options.on_scenes:
        train, test = train_and_test(backbone, options, wanted)
        return LabelledFeatures(train, test, class_count(train.targets[options.label]), [])
    splits = open_splits(options.dataset, options.data)
    sets = [
        image_set(part, preprocess or backbone.preprocess, options.batch_size) for part in (splits.train, splits.val)
    ]
    train, test = (extract(backbone, one, options, wanted) for one in sets)
    return LabelledFeatures(train, test, len(splits.train.classes), splits.notes)


def class_count(labels: Int[Tensor, " n"] | Int[Tensor, "n classes"]) -> int:
    """How many classes labels tell apart."""
    return labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1


def hold_out(count: int, share: float, seed: int) -> tuple[Int[Tensor, " rest"], Int[Tensor, " held"]]:
    """Split indices at random, by the seed: what is fitted on, and what is held out to choose on.

    Raises:
        InputError: too few images to hold any out.
    """
    held = round(count * share)
    if share and not 0 < held < count:
        raise InputError(f"--held_out {share} of {count} training images are {held}; give more images or another share")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held:].sort().values, order[:held].sort().values
