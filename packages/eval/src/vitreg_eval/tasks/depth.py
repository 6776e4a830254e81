"""Linear depth estimation from frozen patch and class tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone

from vitreg_eval.analyses.depth import plot_depth
from vitreg_eval.config import DepthOptions
from vitreg_eval.datasets import scenes
from vitreg_eval.datasets.depth import check_apart, crop_of, max_depth, mean_depth, open_depth
from vitreg_eval.datasets.depth_files import DepthSet
from vitreg_eval.dense import check_aspect
from vitreg_eval.depth_head import FILE, HeadRecord, TrainedHead, load_head, resize_depth, save_head
from vitreg_eval.depth_predict import predict_depth
from vitreg_eval.depth_train import cached_schedule, extracted_maps, fit_depth, fit_extracted
from vitreg_eval.extract import Extracted, train_and_test
from vitreg_eval.files import save_figure
from vitreg_eval.metrics import DepthErrors, Metric, depth_errors, measure
from vitreg_eval.results import Outcome, is_main_process

SHOWN = 6
PREDICTIONS = "predictions.png"
SCENES_STEPS = 300
CHUNK = 64
MAIN = ("rmse", "abs_rel", "delta1")


@dataclass(frozen=True)
class Shown:
    """A picture to be drawn."""

    image: Float[np.ndarray, "height width 3"]
    true: Float[np.ndarray, "height width"]
    predicted: Float[np.ndarray, "height width"]


def run(backbone: Backbone, options: DepthOptions, out: Path) -> Outcome:
    """Root mean square error in metres (mean over images), relative error, and share of pixels within 25 %.

    Of a data set also `sq_rel`, `log10`, `delta2` and `delta3`, and `mean_depth_rmse`, `mean_depth_abs_rel` and
    `mean_depth_delta1` of a head that always says the mean depth of the training set. Writes head.safetensors,
    head.json and predictions.png.
    """
    if options.dataset is None:
        return run_scenes(backbone, options, out)
    test = open_depth(options, "test")
    if options.head is None:
        train = open_depth(options, "train")
        check_apart(train.pairs, test.pairs)
        trained = fit_depth(backbone, train, options, out)
        if is_main_process():
            save_head(trained, out)
        notes = [f"head in {out / FILE}"]
        guess = mean_depth(train)
    else:
        trained = load_head(options.head, backbone, max_depth(options))
        trained.head.to(backbone.device)
        notes, guess = [f"head of {options.head}"], None
    metrics, shown = measure_set(backbone, trained, test, options, guess)
    draw(shown, test.max_depth, out)
    how = f"protocol {options.protocol}: {PROTOCOLS[options.protocol]}"
    return Outcome(metrics, test.pairs.data, [how, *notes, f"pictures in {out / PREDICTIONS}"])


PROTOCOLS = {
    "cached": "features of resized images, computed once; not comparable with published values",
    "dinov2": "new crops at every step, measured at full size",
}


# Data sets


def measure_set(
    backbone: Backbone, trained: TrainedHead, test: DepthSet, options: DepthOptions, guess: float | None
) -> tuple[dict[str, Metric], list[Shown]]:
    """Errors over a test set, and pictures spread over it; with those of saying `guess` metres everywhere."""
    count = len(test.pairs)
    chosen = {index * count // SHOWN for index in range(SHOWN)}
    errors: list[DepthErrors] = []
    controls: list[DepthErrors] = []
    shown = []
    for index in tqdm(range(count), desc="depth", unit="image", disable=None, leave=False):
        image, depth = test.pairs.read(index)
        check_aspect(image, test.pairs.names[index])
        predicted = predict_depth(backbone, trained, image, options)
        errors.append(errors_of(predicted, depth, test, test.pairs.names[index]))
        if guess is not None:
            controls.append(errors_of(torch.full_like(depth, guess), depth, test, test.pairs.names[index]))
        if index in chosen:
            shown.append(Shown(to_array(image), depth.numpy(), predicted.numpy()))
    metrics = metrics_of(errors, [field.name for field in fields(DepthErrors)], options.seed)
    control = metrics_of(controls, MAIN, options.seed) if controls else {}
    return metrics | {f"mean_depth_{name}": metric for name, metric in control.items()}, shown


def errors_of(
    predicted: Float[Tensor, "height width"], depth: Float[Tensor, "height width"], test: DepthSet, name: str
) -> DepthErrors:
    """Errors of one picture over the part that counts."""
    rows, cols = crop_of(test.crop, *depth.shape)
    predicted = predicted if test.cap is None else predicted.clamp(max=test.cap)
    try:
        return depth_errors(predicted[None, rows, cols], depth[None, rows, cols], maximum=test.max_depth)
    except InputError as error:
        raise InputError(str(error).replace("image 0 of the batch", name)) from None


def metrics_of(errors: list[DepthErrors], names: Sequence[str], seed: int) -> dict[str, Metric]:
    """Means over the images."""
    return {name: measure(torch.cat([getattr(error, name) for error in errors]), seed=seed) for name in names}


def to_array(image: Image.Image) -> Float[np.ndarray, "height width 3"]:
    """Pixels in 0 to 1."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def draw(shown: list[Shown], largest: float, out: Path) -> None:
    """Write predictions.png, in the first process."""
    if not is_main_process():
        return
    images, true, predicted = zip(*((picture.image, picture.true, picture.predicted) for picture in shown), strict=True)
    save_figure(plot_depth(images, true, predicted, largest), out / PREDICTIONS)


# Scenes


def run_scenes(backbone: Backbone, options: DepthOptions, out: Path) -> Outcome:
    """Train and measure on drawn scenes."""
    train, test = train_and_test(backbone, options)
    trained = fit_scenes(train, options)
    predicted = predict_scenes(trained, test)
    first = next(scenes(backbone.preprocess, options.test_images, options.seed, "test").batches(0, SHOWN)).images
    pictures = backbone.preprocess.denormalize(first).permute(0, 2, 3, 1).numpy()
    maps = (test.targets["depth"].numpy(), predicted.numpy())
    draw([Shown(*columns) for columns in zip(pictures, *maps, strict=False)], trained.record.max_depth, out)
    return Outcome(errors_of_scenes(predicted, test, options), test.data, [f"pictures in {out / PREDICTIONS}"])


def evaluate(train: Extracted, test: Extracted, options: DepthOptions) -> dict[str, Metric]:
    """Measure on the test set a head trained on the training set, at image resolution."""
    return errors_of_scenes(predict_scenes(fit_scenes(train, options), test), test, options)


def fit_scenes(train: Extracted, options: DepthOptions) -> TrainedHead:
    """Train a head on tokens after the final norm, which other tasks on scenes read too."""
    channels = 2 * train.parts["patches"].shape[-1]
    record = HeadRecord(layers=(-1,), norm=True, channels=channels, max_depth=max_depth(options))
    return fit_extracted(train, record, cached_schedule(options.steps or SCENES_STEPS), options.seed)


@torch.no_grad()
def predict_scenes(trained: TrainedHead, test: Extracted) -> Float[Tensor, "n height width"]:
    """Depth in metres of every pixel."""
    height, width = test.targets["depth"].shape[-2:]
    chunks = torch.arange(len(test)).split(CHUNK)
    return torch.cat([resize_depth(trained.head(extracted_maps(test, chunk)), (height, width)) for chunk in chunks])


def errors_of_scenes(
    predicted: Float[Tensor, "n height width"], test: Extracted, options: DepthOptions
) -> dict[str, Metric]:
    """The main three errors."""
    return metrics_of([depth_errors(predicted, test.targets["depth"])], MAIN, options.seed)
