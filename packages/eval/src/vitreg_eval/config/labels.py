"""Options of the tasks that name classes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator
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
    """Folder of the data set, or one with train/<class>/ and val/<class>/ images; $VITREG_DATA if only --dataset is
    given, drawn scenes if neither is."""
    dataset: str | None = None
    """Name of a data set in its official layout (`vitreg-eval list` names them) or hub:ORG/NAME; class folders if not
    given."""
    label: Literal["label", "relation"] = "label"
    """Of a scene: the class of the main object, or its relation to the others."""

    @property
    def on_scenes(self) -> bool:
        """Whether drawn scenes are measured."""
        return self.data is None and self.dataset is None

    def needs(self) -> list[str]:
        """As for every task."""
        if not self.on_scenes and self.label == "relation":
            raise InputError("--label relation with --data or --dataset: only scenes have relations; leave one out")
        return super().needs()


class KnnOptions(LabelOptions):
    """k-nearest-neighbour classification of the class token (cosine, softmax-weighted votes, as DINOv2)."""

    k: tuple[PositiveInt, ...] = (20,)
    """Neighbours that vote; several numbers, such as the 10,20,100,200 of DINOv2, give a score for each."""
    temperature: PositiveFloat = 0.07
    """Of the softmax over similarities that weighs the votes."""

    @field_validator("k", mode="before")
    @classmethod
    def split_numbers(cls, given: int | str | Iterable[int | str]) -> tuple[int, ...]:
        """Take one number, or several in one word between commas."""
        words = [given] if isinstance(given, int | str) else list(given)
        parts = [part for word in words for part in str(word).split(",")]
        if not parts or not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError("give numbers of neighbours such as 20, or 10,20,100,200")
        return tuple(dict.fromkeys(int(part) for part in parts))


class HeldOutOptions(LabelOptions):
    """What the classifiers take that are fitted with several settings, of which one is chosen."""

    held_out: float = Field(default=0.1, ge=0.0, le=0.5)
    """Part of the training set that is not fitted on, but that the settings are chosen on."""


class LinearOptions(HeldOutOptions):
    """Linear classifiers on frozen tokens: blocks, pooling and learning rates all trained at once, as DINOv2."""

    protocol: Literal["cached", "dinov2"] = "cached"
    """Train on features of every image, computed once, or run the model at every step on random crops and flips, as for
    the published values of DINOv2."""
    steps: PositiveInt | None = None
    """Steps of training; 12,500 (dinov2) or 1,250 (cached) if not given."""
    epochs: PositiveInt | None = None
    """Passes over the training set, in place of a number of steps."""
    train_batch: PositiveInt = 1024
    """Images of a step over all processes, which learning rates are proportional to; at most the training set."""
    save_every: PositiveInt = 500
    """Steps between two writes of the state, from which a stopped training goes on."""

    def needs(self) -> list[str]:
        """As for every task."""
        if self.steps is not None and self.epochs is not None:
            raise InputError(f"--steps {self.steps} with --epochs {self.epochs}: leave one of them out")
        if self.protocol == "dinov2" and self.on_scenes:
            raise InputError("--protocol dinov2 crops photos at random: give --data DIR, or leave it out for scenes")
        return super().needs()


class LogregOptions(HeldOutOptions):
    """Logistic regression on the frozen class token, L-BFGS; the best of 45 penalties, as DINOv2."""

    held_out: float = Field(default=0.1, gt=0.0, le=0.5)
    """Part of the training set that the penalty is chosen on; the classifier is then fitted on all of it."""
    float64: bool = True
    """End every fit in float64, as DINOv2; float32 alone is faster, but inexact for the greatest C."""
    passes: PositiveInt = 1000
    """Most passes over the training set for a penalty."""
