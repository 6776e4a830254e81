"""Options of classification from one token."""

from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt
from vitreg_core.errors import InputError

from vitreg_eval.config.base import AUTO, TaskOptions


class TokensOptions(TaskOptions):
    """Logistic regression on one token per image: class token, each register, a random patch or outlier (Table 1)."""

    dataset: str | None = None
    """Name of a data set with classes (vitreg-eval list), or hub:ORG/NAME; class folders if not given."""
    data: Path | None = None
    """Folder of the data set, or with train/<class>/ and val/<class>/ images; $VITREG_DATA if not given."""
    cutoff: PositiveFloat | None = None
    """Norm in the last block, before the final norm, above which a patch is an outlier (the paper: 150 for DINOv2 g);
    found by the rule of the doctor on some training images if not given."""
    calibration_images: int = Field(default=512, ge=16)
    """Training images, evenly spread, on which the cutoff is found."""
    draws: PositiveInt = 3
    """How often the normal patch and the outlier of every image are drawn; scores are means over the draws."""

    def needs(self) -> list[str]:
        """As for every task."""
        if AUTO in self.registers:
            raise InputError(
                "--registers auto: this task looks into single blocks, whose tokens then differ; give numbers"
            )
        return super().needs()
