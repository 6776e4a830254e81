"""Options of the tasks that compare images with texts."""

from pathlib import Path

from pydantic import PositiveInt
from vitreg_core.errors import InputError

from vitreg_eval.config.base import TaskOptions


class DualOptions(TaskOptions):
    """What the tasks of dual encoders take."""

    def needs(self) -> list[str]:
        """As for every task."""
        if self.registers:
            raise InputError("--registers: a dual encoder is measured with all of its registers; leave it out")
        there = super().needs()
        return ["--model SOURCE, a dual encoder: a folder, open_clip:ARCH/TAG or hub:org/name"] if there else []


class ZeroshotOptions(DualOptions):
    """Zero-shot classification by a dual encoder: every image goes to the class whose prompts are nearest."""

    data: Path | None = None
    """Folder of the data set, or one with val/<class>/ or <class>/ images; $VITREG_DATA if only --dataset is given,
    drawn scenes if neither is."""
    dataset: str | None = None
    """Name of a data set in its official layout (`vitreg-eval list` names them) or hub:ORG/NAME; class folders if not
    given."""
    test_images: PositiveInt = 1000
    """Scenes to measure on, where scenes are measured."""
    classes: Path | None = None
    """Names of the classes, a line each in the order of the folders, or lines of folder, tab, name; open_clip's names
    for folders that are wnids of ImageNet-1k, the names of the folders for others, if not given."""
    templates: Path | None = None
    """Prompts, a line each, with {} where the name of the class stands; the 80 of ImageNet, or the wording of the
    captions for scenes, if not given."""

    @property
    def on_scenes(self) -> bool:
        """Whether drawn scenes are measured."""
        return self.data is None and self.dataset is None


class RetrievalOptions(DualOptions):
    """Image-text retrieval by a dual encoder: recall at 1, 5 and 10 in both directions."""

    data: Path | None = None
    """Captions: a table (.csv or .tsv) with columns filepath, below its folder, and title, one row for each caption; or
    annotations of COCO (captions_val2017.json)."""
    images: Path | None = None
    """Folder of the images of COCO annotations; val2017 beside or above a captions_val2017.json if not given."""

    def needs(self) -> list[str]:
        """As for every task."""
        return super().needs() + ([] if self.data else ["--data FILE, a table or COCO annotations of captions"])
