"""Options of the tasks. This module imports no torch, so that `--help` answers at once."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from vitreg_core.config import Config

AUTO: Literal["auto"] = "auto"


class TaskOptions(Config):
    """What every task takes."""

    model: tuple[str, ...] = ()
    """SOURCE of the model: a folder or run folder, a weights file, or a preset (random weights). Repeat for several."""
    out: Path | None = None
    """Folder for result.json and pictures; runs/eval/<task> if not given."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Where to compute; the fastest there is if not given."""
    precision: Literal["fp32", "fp32-fast", "bf16"] = "fp32"
    """Exact float32, faster float32 products, or bfloat16."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of drawn scenes, heads and bootstrap; the same seed gives the same numbers."""
    batch_size: PositiveInt = 64
    """Images per forward pass."""
    registers: tuple[NonNegativeInt | Literal["auto"], ...] = ()
    """Measure the model with its first registers alone, for each of these numbers (0,1,2,4), and draw the curve; auto
    runs an image with all registers where it has outliers without."""

    @field_validator("registers", mode="before")
    @classmethod
    def split_words(cls, given: str | Iterable[object]) -> tuple[object, ...]:
        """Take several numbers in one word, between commas."""
        words = [part for word in ([given] if isinstance(given, str) else given) for part in str(word).split(",")]
        if not all(word == AUTO or word.isdecimal() for word in words):
            raise ValueError("give numbers of registers such as 0,1,2,4, or auto")
        return tuple(words)


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


class KnnOptions(LabelOptions):
    """k-nearest-neighbour classification of the class token (cosine, softmax-weighted votes, as DINOv2)."""

    k: PositiveInt = 20
    """Neighbours that vote."""
    temperature: PositiveFloat = 0.07
    """Of the softmax over similarities that weighs the votes."""


class LinearOptions(LabelOptions):
    """Logistic regression on the frozen class token; its penalty is chosen on a fifth of the training set."""


class SegmentOptions(ProbeOptions):
    """Linear segmentation of scenes from frozen patch tokens (batch norm and one linear layer); mIoU."""

    steps: PositiveInt = 300
    """Optimizer steps of the head."""


class DepthOptions(ProbeOptions):
    """Linear depth estimation of scenes from frozen patch and class tokens (256 bins); RMSE in metres."""

    steps: PositiveInt = 300
    """Optimizer steps of the head."""


class LostOptions(TaskOptions):
    """LOST object discovery: one box per image from features alone; CorLoc where there are true boxes."""

    dataset: Literal["scenes", "voc07", "voc12"] = "scenes"
    """Images with true boxes."""
    data: Path | None = None
    """Folder that holds VOCdevkit, for voc07 and voc12; $VITREG_DATA if not given."""
    images: Path | None = None
    """Folder of photos without boxes, in place of a data set; gives boxes and no CorLoc."""
    split: str = "trainval"
    """Split of VOC."""
    test_images: PositiveInt = 1000
    """Scenes to measure on."""
    features: Literal["keys", "queries", "values"] = "keys"
    """Which output of the qkv projection (the paper: keys for DINOv2, values for DeiT-III and OpenCLIP)."""
    layer: int = -1
    """Block whose attention is read; blocks count from 0, -1 is the last."""
    k_patches: PositiveInt = 100
    """Patches of lowest degree that may join the seed."""
    center: bool = False
    """Subtract the mean patch of each image first."""
    normalize: bool = False
    """Scale every patch to length 1 first."""
    bias: float = 0.0
    """Added to every similarity."""


class NormsOptions(TaskOptions):
    """Norms of class, register and patch tokens after every block, before the final norm."""

    images: Path | None = None
    """Folder of photos; drawn scenes if not given."""
    limit: PositiveInt | None = None
    """At most this many images, evenly spread over the folder."""
    test_images: PositiveInt = 1000
    """Scenes to measure on."""


class DoctorOptions(NormsOptions):
    """Does this backbone have high-norm outlier tokens, how many, and from which block on? With pictures."""
