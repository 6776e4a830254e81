"""Options of the tasks, a file for each family. Nothing here imports torch, so that `--help` answers at once."""

from vitreg_eval.config.base import AUTO, TaskOptions
from vitreg_eval.config.compare import CompareOptions
from vitreg_eval.config.dense import SegmentOptions
from vitreg_eval.config.depth import DepthOptions
from vitreg_eval.config.embed import EmbedOptions
from vitreg_eval.config.labels import (
    ClassifyOptions,
    HeldOutOptions,
    KnnOptions,
    LabelOptions,
    LinearOptions,
    LogregOptions,
    ProbeOptions,
)
from vitreg_eval.config.lost import LostOptions
from vitreg_eval.config.norms import DoctorOptions, NormsOptions
from vitreg_eval.config.tokens import TokensOptions
from vitreg_eval.config.zeroshot import DualOptions, RetrievalOptions, ZeroshotOptions

__all__ = [
    "AUTO",
    "ClassifyOptions",
    "CompareOptions",
    "DepthOptions",
    "DoctorOptions",
    "DualOptions",
    "EmbedOptions",
    "HeldOutOptions",
    "KnnOptions",
    "LabelOptions",
    "LinearOptions",
    "LogregOptions",
    "LostOptions",
    "NormsOptions",
    "ProbeOptions",
    "RetrievalOptions",
    "SegmentOptions",
    "TaskOptions",
    "TokensOptions",
    "ZeroshotOptions",
]
