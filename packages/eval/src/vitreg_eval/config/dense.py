"""Options of segmentation."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt
from vitreg_core.errors import InputError

from vitreg_eval.config.labels import ProbeOptions

DATA_ONLY = ("data", "protocol", "layers", "head", "crop", "limit", "ignore_zero")


class SegmentOptions(ProbeOptions):
    """Linear segmentation from frozen patch tokens (batch norm and one linear layer, as DINOv2); mIoU."""

    dataset: Literal["ade20k", "cityscapes", "voc12", "masks"] | None = None
    """Layout of --data; masks is any folder of images and annotations. Scenes if not given."""
    data: Path | None = None
    """Folder of the data set; $VITREG_DATA if not given."""
    protocol: Literal["cached", "dinov2"] = "cached"
    """cached: the features of one crop of every image are computed once. dinov2: scale, crop, side and colours change
    and the backbone runs at every step, as where the published numbers come from. Both measure in the same way."""
    layers: Literal[1, 4] = 1
    """Last blocks that the head reads side by side."""
    head: Path | None = None
    """head.safetensors of an earlier run, or a linear or ms head released for DINOv2 (.pth); measured, not trained."""
    steps: PositiveInt | None = None
    """Optimizer steps of the head: 300 for scenes, 1000 cached, 40000 dinov2 if not given."""
    batch_size: PositiveInt = 16
    """Images of a training batch (64 for scenes), and images per forward pass."""
    crop: int | None = Field(default=None, ge=16, le=4096)
    """Side of crops and windows in pixels, 512 if not given; cached takes the nearest multiple of the patch size."""
    limit: PositiveInt | None = None
    """At most this many images to train on and to measure on, evenly spread over each split."""
    ignore_zero: bool = False
    """The value 0 in the masks of a folder does not count, and class 0 is the value 1."""

    def needs(self) -> list[str]:
        """As for every task."""
        if self.dataset is None:
            for name in DATA_ONLY:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise InputError(
                        f"--{name} {getattr(self, name)} without --dataset; give ade20k, cityscapes, voc12 or masks"
                    )
        if self.ignore_zero and self.dataset != "masks":
            raise InputError(f"--ignore_zero with --dataset {self.dataset}, whose classes are fixed; leave it out")
        if self.head is not None:
            for name in ("steps", "layers"):
                given = getattr(self, name)
                if given != type(self).model_fields[name].default:
                    raise InputError(f"--{name} {given} with --head {self.head}, which is not trained; give one")
        return super().needs()
