"""Features of the training and the evaluation set that the options of a classification task name."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from vitreg_core.data.images import Preprocess
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone

from vitreg_eval.config import LabelOptions
from vitreg_eval.config.datasets import HUB
from vitreg_eval.datasets import image_set, scenes
from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.labelled import count_note, open_labelled
from vitreg_eval.datasets.leakage import check_classes, check_disjoint
from vitreg_eval.extract import Extracted, extract
from vitreg_eval.paths import data_folder
from vitreg_eval.tokens import Wanted

CLASS_TOKENS = Wanted()
"""The class token of the last layer."""


@dataclass(frozen=True)
class Splits:
    """A labelled data set."""

    train: Examples
    val: Examples
    """What numbers are reported on."""
    notes: list[str]
    """What the reader must know of the images."""


@dataclass(frozen=True)
class LabelledFeatures:
    """Features to fit on and to report on."""

    train: Extracted
    test: Extracted
    classes: int
    notes: list[str]
    """What the reader must know of the images."""


def open_splits(options: LabelOptions) -> Splits:
    """The data set that the options name; its splits have the same classes and share no image.

    Raises:
        InputError: it is missing or damaged, or its splits do not go together.
    """
    train, val = (open_split(options, split) for split in ("train", "val"))
    check_classes(train, val)
    notes = check_disjoint(train, val)
    return Splits(train, val, [*notes, *filter(None, (count_note(train.data), count_note(val.data)))])


def open_split(options: LabelOptions, split: str) -> Examples:
    """One split, `train` or `val`, of the data set that the options name.

    Raises:
        InputError: it is missing or damaged.
    """
    from_hub = options.dataset is not None and options.dataset.startswith(HUB)
    return open_labelled(options.dataset, options.data if from_hub else data_folder(options.data), split)


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
        counts = {"train": options.train_images, "test": options.test_images}
        sets = [scenes(backbone.preprocess, count, options.seed, split) for split, count in counts.items()]
        train, test = (extract(backbone, one, options, wanted) for one in sets)
        return LabelledFeatures(train, test, class_count(train.targets[options.label]), [])
    splits = open_splits(options)
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
