"""The model after a remedy, and the images that it was calibrated on, none of which is shown."""

from typing import NamedTuple

import torch
from vitreg_core.denoise import denoise
from vitreg_core.register_neurons import Neuron, RegisterNeurons
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
    neurons: RegisterNeurons | None = None
    """The register neurons that were moved; None for other remedies, and where there are none."""


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
    if options.remedy == "random":
        drawn = draw_neurons(model, found, options.seed)
        told = f"a control: {len(drawn)} neurons drawn at random from the same blocks, to {found.tokens} registers"
        return Remedied(with_test_time_registers(model, drawn, found.tokens), told)
    return Remedied(with_test_time_registers(model, found), f"{found.verdict}, on {found.images} other images", found)


def draw_neurons(model: Model, found: RegisterNeurons, seed: int) -> list[Neuron]:
    """As many other neurons of the same blocks, by the seed."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, *[model.preprocess.config.image_size] * 2, device=model.device)
    drawn: list[Neuron] = []
    for layer, _ in found.neurons:
        with torch.no_grad():
            units = model.hidden(image, layer).shape[-1]
        taken = {*found.neurons, *drawn}
        order = torch.randperm(units, generator=generator).tolist()
        drawn.append(next(one for unit in order if (one := Neuron(layer, unit)) not in taken))
    return drawn


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
