"""Options of depth estimation."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt
from vitreg_core.errors import InputError

from vitreg_eval.config.labels import ProbeOptions


class DepthOptions(ProbeOptions):
    """Linear depth estimation from frozen patch and class tokens (256 bins, as DINOv2); RMSE in metres."""

    dataset: Literal["nyu", "kitti", "sun-rgbd", "rgbd"] | None = None
    """Layout of --data; sun-rgbd takes a head that was trained on nyu (--head); rgbd is any folder of pairs. Scenes if
    not given."""
    data: Path | None = None
    """Folder of the data set; $VITREG_DATA if not given."""
    protocol: Literal["cached", "dinov2"] = "cached"
    """cached: the features of resized images are computed once. dinov2: crops and colours change and the backbone runs
    at every step, as where the published numbers come from; evaluation at full size."""
    layers: Literal[1, 4] = 1
    """Blocks that the head reads: the last, or four (lin. 1 and lin. 4 of DINOv2)."""
    head: Path | None = None
    """head.safetensors of an earlier run, or a linear depth head released for DINOv2 (.pth); evaluated, not trained."""
    steps: PositiveInt | None = None
    """Optimizer steps of the head: 300 for scenes, 500 cached, 38400 dinov2 if not given."""
    image_size: PositiveInt | None = None
    """Shorter side in pixels to which cached resizes images; that of the model if not given."""
    max_depth: PositiveFloat | None = Field(default=None, allow_inf_nan=False)
    """Largest depth in metres that is learned and counted: 80 for kitti, else 10 if not given."""
    depth_scale: PositiveFloat | None = Field(default=None, allow_inf_nan=False)
    """Units of the depth files per metre: 256 for kitti, else 1000 if not given."""
    crop: Literal["garg", "eigen"] = "garg"
    """Part of a kitti image that counts; nyu has one crop, which is Eigen's."""
    flip: bool = True
    """Average the prediction with that of the mirrored image."""

    def needs(self) -> list[str]:
        """As for every task."""
        if self.dataset is None:
            for name in ("data", "layers", "protocol", "image_size", "max_depth", "depth_scale", "head"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise InputError(
                        f"--{name} {getattr(self, name)} without --dataset; give nyu, kitti, sun-rgbd or rgbd"
                    )
        if self.protocol == "dinov2" and self.image_size is not None:
            raise InputError(
                f"--image_size {self.image_size} with --protocol dinov2, which reads whole images; drop one"
            )
        if self.head is not None:
            for name in ("steps", "layers"):
                given = getattr(self, name)
                if given != type(self).model_fields[name].default:
                    raise InputError(f"--{name} {given} with --head {self.head}, which is not trained; give one")
        missing = super().needs()
        if self.dataset == "sun-rgbd" and self.head is None:
            missing.append("--head FILE, a head trained on nyu (sun-rgbd is measured by transfer)")
        return missing
