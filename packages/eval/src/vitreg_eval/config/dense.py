"""Options of the tasks that name every pixel."""

from pydantic import PositiveInt

from vitreg_eval.config.labels import ProbeOptions


class SegmentOptions(ProbeOptions):
    """Linear segmentation of scenes from frozen patch tokens (batch norm and one linear layer); mIoU."""

    steps: PositiveInt = 300
    """Optimizer steps of the head."""


class DepthOptions(ProbeOptions):
    """Linear depth estimation of scenes from frozen patch and class tokens (256 bins); RMSE in metres."""

    steps: PositiveInt = 300
    """Optimizer steps of the head."""
