"""Options of the tasks, a file for each family. Nothing here imports torch, so that `--help` answers at once."""

from vitreg_eval.config.base import AUTO, TaskOptions
from vitreg_eval.config.dense import DepthOptions, SegmentOptions
from vitreg_eval.config.labels import ClassifyOptions, KnnOptions, LabelOptions, LinearOptions, ProbeOptions
from vitreg_eval.config.lost import LostOptions
from vitreg_eval.config.norms import DoctorOptions, NormsOptions

__all__ = [
    "AUTO",
    "ClassifyOptions",
    "DepthOptions",
    "DoctorOptions",
    "KnnOptions",
    "LabelOptions",
    "LinearOptions",
    "LostOptions",
    "NormsOptions",
    "ProbeOptions",
    "SegmentOptions",
    "TaskOptions",
]
