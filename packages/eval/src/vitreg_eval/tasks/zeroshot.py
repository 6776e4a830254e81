"""Zero-shot classification: an image belongs to the class whose prompts are nearest in the joint space."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.data.images import labelled_images
from vitreg_core.data.scenes import TEXTURES

from vitreg_eval.config.datasets import HUB
from vitreg_eval.config.zeroshot import ZeroshotOptions
from vitreg_eval.datasets import ImageSet, image_set, scenes
from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.folders import TEST, TRAIN, VAL, split_folder
from vitreg_eval.datasets.labelled import count_note, open_labelled
from vitreg_eval.datasets.layouts import image_files
from vitreg_eval.dual import Dual
from vitreg_eval.extract import extract
from vitreg_eval.metrics import Metric, measure, top_k
from vitreg_eval.paths import data_folder
from vitreg_eval.prompts import PLACE, Names, class_names, templates
from vitreg_eval.results import Outcome
from vitreg_eval.scoring import score
from vitreg_eval.texts import class_features

Folders = Int[Tensor, " n"] | Int[Tensor, "n folders"]
"""A class of the data for each picture, or a row of 1 (there), 0 (not there), -1 (not judged)."""
TOP5 = 5
ROWS = 4096
"""Images whose similarities are computed at once."""


def run(dual: Dual, options: ZeroshotOptions, out: Path) -> Outcome:  # noqa: ARG001 (draws nothing)
    """Top-1, top-5 (of more than five classes) and mean per-class recall, 0 to 1.

    Where pictures have several classes: mean average precision.

    Raises:
        InputError: images, class names or templates that are missing or do not fit.
    """
    images, folders, notes = open_images(dual, options)
    names = class_names(folders, options.classes)
    prompts = templates(options.templates, scenes=options.on_scenes)
    classes = class_features(dual, names.names, prompts, options.cache)
    found = extract(dual, images, options)
    scores = similarities(found.cls, classes)
    notes = [*notes, *names.notes, describe(names, prompts)]
    if cut := dual.too_long([prompt.replace(PLACE, max(names.names, key=len)) for prompt in prompts]):
        notes.append(f"warning: {cut} prompts with the longest class name are longer than the text tower reads")
    return Outcome(evaluate(scores, found.targets["label"], names, options.seed), found.data, notes)


def open_images(dual: Dual, options: ZeroshotOptions) -> tuple[ImageSet, Sequence[str], list[str]]:
    """The images of the options, what their data set calls the classes, and sentences for the reader.

    Raises:
        InputError: they are missing or damaged.
    """
    if options.on_scenes:
        return scenes(dual.preprocess, options.test_images, options.seed, "test"), TEXTURES, []
    examples = open_examples(options)
    note = count_note(examples.data)
    return image_set(examples, dual.preprocess, options.batch_size), examples.classes, [note] if note else []


def open_examples(options: ZeroshotOptions) -> Examples:
    """Labelled images: the split that numbers are reported on, or class folders alone.

    Raises:
        InputError: they are missing or damaged.
    """
    if options.dataset is not None:
        folder = options.data if options.dataset.startswith(HUB) else data_folder(options.data)
        return open_labelled(options.dataset, folder, "val")
    folder = data_folder(options.data)
    if split_folder(folder, (*TRAIN, *VAL, *TEST)):
        return open_labelled(None, folder, "val")
    found = labelled_images(folder)
    files = [path.relative_to(folder).as_posix() for path in found.paths]
    return image_files(folder.resolve().name, "", folder, files, torch.tensor(found.labels), found.classes)


def similarities(images: Float[Tensor, "n e"], classes: Float[Tensor, "classes e"]) -> Float[Tensor, "n classes"]:
    """Cosines of images, of any length, and classes of length 1."""
    return torch.cat([F.normalize(part, dim=-1) @ classes.T for part in images.split(ROWS)])


def evaluate(scores: Float[Tensor, "n classes"], labels: Folders, names: Names, seed: int) -> dict[str, Metric]:
    """Scores of the similarities; labels are indices into the classes of the data."""
    places = torch.tensor(names.positions)
    if labels.ndim == 2:
        name, metric = score(scores[:, places], labels, seed)
        return {name: metric}
    truth = places[labels.long()]
    right = top_k(scores, truth)
    found = {"top1": measure(right, seed=seed)}
    if scores.shape[1] > TOP5:
        found["top5"] = measure(top_k(scores, truth, TOP5), seed=seed)
    found["mean_class_recall"] = measure(torch.stack([truth, right.long()], dim=1), class_recall, seed=seed)
    return found


def class_recall(values: Int[Tensor, "n 2"], counts: Float[Tensor, "repeats n"]) -> Float[Tensor, " repeats"]:
    """Share of each class's images that are right, averaged over the classes that occur.

    Args:
        values: class of each image, and 1 where it is right.
        counts: how often each image was drawn.
    """
    labels, right = values.unbind(dim=1)
    empty = counts.new_zeros(len(counts), int(labels.max()) + 1)
    there = empty.index_add(1, labels, counts)
    return (empty.index_add(1, labels, counts * right) / there).nanmean(dim=1)


def describe(names: Names, prompts: Sequence[str]) -> str:
    """What was chosen between, with a hash that tells other names and prompts."""
    digest = hashlib.sha256("\n".join([*names.names, "", *prompts]).encode()).hexdigest()[:12]
    kinds = f"{len(names.names):,} class names in {len(prompts)} prompts each ({digest})"
    others = len(names.names) - len(names.positions)
    without = f", {others:,} of them of classes that the data do not have" if others else ""
    return f"{kinds}{without}; chance is {1 / len(names.names):.3g}"
