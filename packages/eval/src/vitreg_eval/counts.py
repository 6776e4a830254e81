"""One model with several numbers of registers, each measured as if it were a model of its own."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from vitreg_core.elastic import AutoRegisters, calibrate
from vitreg_core.precision import use_precision
from vitreg_core.vit import VisionTransformer

from vitreg_eval.analyses.registers import plot_register_curves
from vitreg_eval.config import AUTO, ClassifyOptions, LabelOptions, NormsOptions, TaskOptions
from vitreg_eval.datasets import ImageSet, image_set, photo_folder, scenes
from vitreg_eval.datasets.examples import subset
from vitreg_eval.datasets.labelled import open_labelled
from vitreg_eval.metrics import Metric, measure
from vitreg_eval.paths import data_folder
from vitreg_eval.results import Outcome, make_folder, result, write_result
from vitreg_eval.task import Task

CALIBRATION_IMAGES = 256


def measure_counts(task: Task, model: VisionTransformer, options: TaskOptions, out: Path) -> Outcome:
    """Measure a model for every entry of --registers; writes a folder for each, and registers.png with the curve.

    Returns:
        All metrics, each named with its number of registers behind (`top1_reg4`, `top1_auto`).

    Raises:
        InputError: more registers than the model has.
    """
    models = {count: variant(model, count, options) for count in dict.fromkeys(options.registers)}
    outcomes = {}
    for count, one in models.items():
        folder = out / label(count)
        make_folder(folder)
        started = time.perf_counter()
        torch.manual_seed(options.seed)
        outcomes[count] = task.run(one, options, folder)
        if isinstance(one, AutoRegisters):
            outcomes[count].metrics.update(cost(one, options.seed))
        alone = options.model_copy(update={"registers": (count,)})
        write_result(folder, result(task.name, one, outcomes[count], alone, time.perf_counter() - started))
    return join({label(count): outcome for count, outcome in outcomes.items()}, out)


def label(count: int | str) -> str:
    """What tells a number of registers in names."""
    return AUTO if count == AUTO else f"reg{count}"


def variant(model: VisionTransformer, count: int | str, options: TaskOptions) -> VisionTransformer:
    """The model with its first registers alone, or with a number chosen by image; it shares all weights."""
    if isinstance(count, int):
        view = model.with_registers(count)
        view.source = f"{model.source}, {count} registers"
        return view
    images = calibration_images(model, options)
    with use_precision(options.precision, model.device):
        return AutoRegisters(model, calibrate(model, (batch.images.to(model.device) for batch in images.batches())))


def calibration_images(model: VisionTransformer, options: TaskOptions) -> ImageSet:
    """Images like those of the task: of its training set where it has one, else of the set itself, without labels."""
    if isinstance(options, LabelOptions) and not options.on_scenes:
        train = open_labelled(options.dataset, options.data, "train")
        count = min(CALIBRATION_IMAGES, len(train))
        record = train.data.model_copy(update={"n": count})
        spread = subset(train, torch.arange(count) * len(train) // count, record)
        return image_set(spread, model.preprocess, options.batch_size)
    folder = None
    if isinstance(options, ClassifyOptions):
        folder = data_folder(options.data)
    elif isinstance(options, NormsOptions):
        folder = options.images
    if folder is None:
        return scenes(model.preprocess, CALIBRATION_IMAGES, options.seed, "train")
    return photo_folder(model.preprocess, folder, CALIBRATION_IMAGES, options.batch_size)


def cost(auto: AutoRegisters, seed: int) -> dict[str, Metric]:
    """Share of the images that were run twice, and FLOPs over those of one pass with all registers."""
    found = auto.cost(auto.preprocess.config.image_size)
    twice = torch.arange(found.images) < auto.repeated
    return {"run_twice": measure(twice, seed=seed), "relative_flops": Metric(value=found.relative, n=found.images)}


def join(outcomes: Mapping[str, Outcome], out: Path) -> Outcome:
    """One outcome of several, and the picture of it."""
    metrics = {f"{name}_{which}": m for which, outcome in outcomes.items() for name, m in outcome.metrics.items()}
    plot_register_curves({which: outcome.metrics for which, outcome in outcomes.items()}).savefig(out / "registers.png")
    notes = [f"{which}: {note}" for which, outcome in outcomes.items() for note in outcome.notes]
    if AUTO in outcomes and not outcomes[AUTO].metrics["run_twice"].value:
        notes.append("auto: no image has outliers without registers, so that none is run with them")
    first = next(iter(outcomes.values()))
    return Outcome(metrics, first.data, [*notes, f"the curve in {out / 'registers.png'}"])
