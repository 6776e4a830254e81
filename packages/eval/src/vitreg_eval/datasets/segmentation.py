"""The segmentation data sets by name."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from vitreg_core.errors import InputError

from vitreg_eval.config import SegmentOptions
from vitreg_eval.datasets.ade20k import ade20k
from vitreg_eval.datasets.cityscapes import cityscapes
from vitreg_eval.datasets.examples import Pairs
from vitreg_eval.datasets.masks import MaskSet, open_masks
from vitreg_eval.datasets.voc_masks import voc_masks
from vitreg_eval.paths import data_folder

DATASETS: dict[str, Callable[[Path, str], MaskSet]] = {
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "voc12": voc_masks,
}


class TrainAndTest(NamedTuple):
    """The two splits of a data set."""

    train: MaskSet | None
    """None where a trained head is given."""
    test: MaskSet


def open_segmentation(options: SegmentOptions) -> TrainAndTest:
    """The data set that the options name; its official validation split is what is measured on.

    Raises:
        InputError: it is not there or incomplete, or the splits share an image.
    """
    root = data_folder(options.data)
    reader = DATASETS.get(options.dataset or "", partial(open_masks, ignore_zero=options.ignore_zero))
    test = reader(root, "val")
    if options.head is not None:
        return TrainAndTest(None, limited(test, options))
    train = reader(root, "train")
    both = set(train.pairs.names) & set(test.pairs.names)
    if both:
        raise InputError(
            f"{min(both)}: is in the training and in the validation split; remove it from one of the lists"
        )
    return TrainAndTest(limited(train, options), limited(test, options))


def limited(part: MaskSet, options: SegmentOptions) -> MaskSet:
    """A split with as many of its pairs as the options ask for."""
    return replace(part, pairs=evenly(part.pairs, options.limit))


def evenly(pairs: Pairs, limit: int | None) -> Pairs:
    """At most so many of the pairs, evenly spread."""
    count = len(pairs)
    if limit is None or limit >= count:
        return pairs
    chosen = [index * count // limit for index in range(limit)]
    return Pairs(
        data=pairs.data.model_copy(update={"n": limit, "hash": f"{pairs.data.hash}-{limit}"}),
        read=lambda index: pairs.read(chosen[index]),
        names=[pairs.names[index] for index in chosen],
    )
