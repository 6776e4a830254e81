"""The model after a remedy, and the images that it was calibrated on, none of which is shown."""

from typing import NamedTuple

import torch
from vitreg_core.denoise import denoise
from vitreg_core.test_time import find_register_neurons, with_test_time_registers

from vitreg_eval.config import DoctorOptions
from vitreg_eval.datasets import TolerantSet, scenes, tolerant_folder
from vitreg_eval.models import Model

CALIBRATION = 500
"""Images that register neurons are found on, at most."""


class Remedied(NamedTuple):
    """A model after a remedy."""

    model: Model | None
    """None where there is nothing to mend."""
    told: str
    """What was done, in one sentence."""


def remedy(model: Model, options: DoctorOptions) -> Remedied:
    """Apply the remedy of the options.

    Raises:
        InputError: too few images to find register neurons on, or a model whose MLPs cannot be reached.
    """
    if options.remedy == "denoise":
        mended = denoise(model, seed=options.seed)
        return Remedied(mended, f"patch tokens averaged over {mended.shifts} shifted views")
    calibration = open_images(model, options, "calibration")
    parts = [batch.images[batch.targets.get("readable", torch.ones(len(batch.images), dtype=torch.bool))]
             for batch in calibration.images.batches()]  # fmt: skip
    found = find_register_neurons(model, [part for part in parts if len(part)])
    if found.cutoff is None:
        return Remedied(None, f"{found.verdict}, so nothing was changed")
    return Remedied(with_test_time_registers(model, found), f"{found.verdict}, on {found.images} other images")


def open_images(model: Model, options: DoctorOptions, part: str = "all") -> TolerantSet:
    """The photos of the options, or drawn scenes: all of them, those to calibrate on, or those to report on.

    Raises:
        InputError: missing or empty folder, or one image where two are needed.
    """
    if options.images is None:
        count, split = (CALIBRATION, "train") if part == "calibration" else (options.test_images, "test")
        return TolerantSet(scenes(model.preprocess, count, options.seed, split), [])
    offset = {"all": None, "calibration": 0, "report": 1}[part]
    limit = min(options.limit or CALIBRATION, CALIBRATION) if part == "calibration" else options.limit
    return tolerant_folder(model.preprocess, options.images, limit, options.batch_size, half=offset)
