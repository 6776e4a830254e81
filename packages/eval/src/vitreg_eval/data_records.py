"""Which images a task would report on, without measuring: so that a finished result is known to be of the same data."""

from collections.abc import Callable
from typing import Any

from vitreg_core.features import Backbone

from vitreg_eval.config import TaskOptions
from vitreg_eval.paths import data_folder
from vitreg_eval.results import DataRecord


def data_record(task: str, options: TaskOptions, backbone: Backbone) -> DataRecord | None:
    """Record of the images that numbers of a task are reported on; None for tasks that no table of the paper needs.

    Raises:
        InputError: the images are not there.
    """
    return RECORDS[task](options, backbone) if task in RECORDS else None


def labelled(options: Any, backbone: Backbone) -> DataRecord:  # noqa: ANN401, ARG001 (options of several tasks)
    """Of the tasks on labelled images."""
    from vitreg_eval.datasets.labelled import open_labelled

    return open_labelled(options.dataset, options.data, "val").data


def classify(options: Any, backbone: Backbone) -> DataRecord:  # noqa: ANN401
    """Of the images that a model's own head is measured on."""
    from vitreg_eval.datasets import labelled_folder

    return labelled_folder(backbone.preprocess, data_folder(options.data), "", options.batch_size).data


def segment(options: Any, backbone: Backbone) -> DataRecord:  # noqa: ANN401, ARG001
    """Of segmentation."""
    from vitreg_eval.datasets.segmentation import open_segmentation

    return open_segmentation(options)[1].pairs.data


def depth(options: Any, backbone: Backbone) -> DataRecord:  # noqa: ANN401, ARG001
    """Of depth estimation."""
    from vitreg_eval.datasets.depth import open_depth

    return open_depth(options, "test").pairs.data


def lost(options: Any, backbone: Backbone) -> DataRecord:  # noqa: ANN401
    """Of object discovery."""
    from vitreg_eval.tasks.lost import open_photos

    return open_photos(backbone, options).data


RECORDS: dict[str, Callable[[Any, Backbone], DataRecord]] = {
    "tokens": labelled,
    "zeroshot": labelled,
    "knn": labelled,
    "linear": labelled,
    "logreg": labelled,
    "classify": classify,
    "segment": segment,
    "depth": depth,
    "lost": lost,
}
"""By task."""
