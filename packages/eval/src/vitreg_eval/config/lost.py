"""Options of object discovery."""

import os
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt
from vitreg_core.errors import InputError

from vitreg_eval.config.base import AUTO, TaskOptions


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

    def needs(self) -> list[str]:
        """As for every task."""
        if self.dataset == "scenes" and self.data is not None:
            raise InputError(
                f"--data {self.data} with --dataset scenes; give --dataset voc07 or voc12, or --images DIR"
            )
        if self.images is not None and self.dataset != "scenes":
            raise InputError(f"--images {self.images} with --dataset {self.dataset}; give one of them")
        if AUTO in self.registers:
            raise InputError(
                "--registers auto: this task looks into single blocks, whose tokens then differ; give numbers"
            )
        needs_data = self.dataset != "scenes" and self.data is None and not os.environ.get("VITREG_DATA")
        missing = ["--data DIR, the folder that holds VOCdevkit (or set VITREG_DATA)"] if needs_data else []
        return [*super().needs(), *missing]
