"""Options of the tasks that look at token norms."""

from pathlib import Path
from typing import Literal

from pydantic import PositiveFloat, PositiveInt
from vitreg_core.errors import InputError

from vitreg_eval.config.base import AUTO, TaskOptions


class NormsOptions(TaskOptions):
    """Norms of class, register and patch tokens after every block, before the final norm."""

    images: Path | None = None
    """Folder of photos; drawn scenes if not given."""
    limit: PositiveInt | None = None
    """At most this many images, evenly spread over the folder."""
    test_images: PositiveInt = 1000
    """Scenes to measure on."""

    def needs(self) -> list[str]:
        """As for every task."""
        if self.limit is not None and self.images is None:
            raise InputError(f"--limit {self.limit} without --images; for scenes give --test_images")
        return super().needs()


EFFECTS = ("lost", "segment", "knn", "classify")
"""Tasks that tell what a remedy does, each with an option for its data."""


class DoctorOptions(NormsOptions):
    """Does this backbone have high-norm outlier tokens, where, since when, at what cost, what helps? One page."""

    compare: str | None = None
    """SOURCE of a second model, shown beside the first on the same images and colour scales."""
    cutoff: PositiveFloat | None = None
    """A norm of your own above which a token counts, such as the paper's 150; shown beside the rule's, never in its
    place."""
    remedy: Literal["test-time", "denoise", "random"] | None = None
    """Show the model before and after: with its register neurons moved to test-time registers (found on every other
    image, shown on the rest), or averaged over shifts of the image. random is a control: as many neurons of the same
    blocks, drawn by the seed, moved in their place."""
    after: str | None = None
    """SOURCE of the same model after a remedy of its own, such as a run of distill_registers; shown as --remedy."""
    lost: Path | None = None
    """A VOCdevkit: LOST on VOC 2012 before and after."""
    segment: Path | None = None
    """A folder of images and masks: mIoU of a linear head before and after."""
    knn: Path | None = None
    """Class folders below train/ and val/: k-NN before and after."""
    classify: Path | None = None
    """Class folders in the order of the model's own head: its accuracy before and after."""

    def needs(self) -> list[str]:
        """As for every task."""
        shown = [f"--{name} {given}" for name in ("compare", "remedy", "after") if (given := getattr(self, name))]
        if len(shown) > 1:
            raise InputError(f"{' and '.join(shown)}: one second model is shown; give one of them")
        for name in EFFECTS:
            folder = getattr(self, name)
            if folder is not None and not shown:
                raise InputError(f"--{name} {folder}: before and after what? Give --remedy or --after")
            if folder is not None and not folder.is_dir():
                raise InputError(f"--{name} {folder}: no such folder; give the data of that task, or leave it out")
        if AUTO in self.registers:
            raise InputError(
                "--registers auto: this task looks into single blocks, whose tokens then differ; give numbers"
            )
        return super().needs()
