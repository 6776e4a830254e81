"""Options of the tasks that look at token norms."""

from pathlib import Path

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


class DoctorOptions(NormsOptions):
    """Does this backbone have high-norm outlier tokens, where, since when, at what cost, what helps? One page."""

    compare: str | None = None
    """SOURCE of a second model, shown beside the first on the same images and colour scales."""
    cutoff: PositiveFloat | None = None
    """A norm of your own above which a token counts, such as the paper's 150; shown beside the rule's, never in its
    place."""

    def needs(self) -> list[str]:
        """As for every task."""
        if AUTO in self.registers:
            raise InputError(
                "--registers auto: this task looks into single blocks, whose tokens then differ; give numbers"
            )
        return super().needs()
