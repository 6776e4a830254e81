"""What training hands its model to, again and again: k-NN and the head on the validation split."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from vitreg_core.config import override
from vitreg_core.data.images import class_folders
from vitreg_core.errors import InputError
from vitreg_core.precision import Precision, use_precision
from vitreg_core.vit import VisionTransformer

from vitreg_eval.config import KnnOptions
from vitreg_eval.datasets import ImageSet, readable_sample, scenes
from vitreg_eval.extract import in_memory
from vitreg_eval.tasks import knn
from vitreg_eval.tokens import Wanted

TRAIN_SCENES, TEST_SCENES = 3000, 1000
"""Drawn scenes that vote and that are judged; no run trains on them."""
MOST_PHOTOS = 5000
"""Photos of a split that are read; more are left out evenly."""
NEIGHBOURS = 20


def evaluations(
    folder: Path | None, label: Literal["label", "relation"], precision: Precision
) -> dict[str, Callable[[VisionTransformer], dict[str, float]]]:
    """Top-1 accuracies, 0 to 1, by name: `knn` of the class token, `head` of the classifier.

    Args:
        folder: holds train/<class>/ and val/<class>/ images; drawn scenes without one.
        label: what to name of a scene.
        precision: of the model's arithmetic.

    Raises:
        InputError: the folder has no train or no val, or other classes in them.
    """
    if folder is not None:
        check_folders(folder)
    options = KnnOptions(
        data=folder,
        label=label,
        k=NEIGHBOURS,
        train_images=TRAIN_SCENES,
        test_images=TEST_SCENES,
        precision=precision,
    )

    def nearest(model: VisionTransformer) -> dict[str, float]:
        if folder is None:
            sizes = {"train": options.train_images, "test": options.test_images}
            sets = [scenes(model.preprocess, count, options.seed, split) for split, count in sizes.items()]
        else:
            sets = [sample(model, folder, split, options) for split in ("train", "val")]
        train, test = (in_memory(model, images, options, Wanted()) for images in sets)  # in one of all processes
        there = override(options, {"k": min(NEIGHBOURS, len(train))})
        found = knn.evaluate(train, test, there)
        return {name: metric.value for name, metric in found.items()}

    def head(model: VisionTransformer) -> dict[str, float]:
        images = (
            scenes(model.preprocess, options.test_images, options.seed, "test")
            if folder is None
            else sample(model, folder, "val", options)
        )
        return {"top1": head_accuracy(model, images, options)}

    return {"knn": nearest, "head": head}


def check_folders(folder: Path) -> None:
    """Refuse a folder without train or val, or whose class folders differ, since labels would not mean the same.

    Raises:
        InputError: names what is missing.
    """
    for split in ("train", "val"):
        if not (folder / split).is_dir():
            raise InputError(f"evaluations need {folder / split}, which is not there; make it, or do not evaluate")
    train, val = (set(class_folders(folder / split)) for split in ("train", "val"))
    if train != val:
        raise InputError(f"{folder}: class folders only in train or val: {sorted(train ^ val)[:5]}; make them equal")


def sample(model: VisionTransformer, folder: Path, split: str, options: KnnOptions) -> ImageSet:
    """Images of a split that are measured: few enough that the other processes can wait for it."""
    return readable_sample(model.preprocess, folder, split, options.batch_size, MOST_PHOTOS)


@torch.no_grad()
def head_accuracy(model: VisionTransformer, images: ImageSet, options: KnnOptions) -> float:
    """Share of the images whose class the head names, 0 to 1."""
    right: list[bool] = []
    for batch in images.batches():
        with use_precision(options.precision, model.device):
            named = model.classify(batch.images.to(model.device)).argmax(dim=-1)
        right += (named.cpu() == batch.targets[options.label]).tolist()
    return sum(right) / len(right)
