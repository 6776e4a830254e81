"""Options of the tasks that name classes."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt
from vitreg_core.errors import InputError

from vitreg_eval.config.base import TaskOptions


class ClassifyOptions(TaskOptions):
    """Top-1 and top-5 accuracy of a model's own head on a folder of labelled images."""

    data: Path | None = None
    """Folder with one sub-folder per class, sorted like the outputs of the head; $VITREG_DATA if not given."""


class ProbeOptions(TaskOptions):
    """What the tasks on frozen features of a training and a test set take."""

    train_images: int = Field(default=3000, ge=50)
    """Scenes to fit on."""
    test_images: PositiveInt = 1000
    """Scenes to measure on; never part of any training set."""


class LabelOptions(ProbeOptions):
    """What the classification tasks on frozen features take."""

    data: Path | None = None
    """Folder with train/<class>/ and val/<class>/ images; drawn scenes if not given."""
    label: Literal["label", "relation"] = "label"
    """Of a scene: the class of the main object, or its relation to the others."""

    def needs(self) -> list[str]:
        """As for every task."""
        if self.data is not None and self.label == "relation":
            raise InputError("--label relation with --data: only scenes have relations; leave one of them out")
        return super().needs()


class KnnOptions(LabelOptions):
    """k-nearest-neighbour classification of the class token (cosine, softmax-weighted votes, as DINOv2)."""

    k: PositiveInt = 20
    """Neighbours that vote."""
    temperature: PositiveFloat = 0.07
    """Of the softmax over similarities that weighs the votes."""


class LinearOptions(LabelOptions):
    """Logistic regression on the frozen class token; its penalty is chosen on a fifth of the training set."""
