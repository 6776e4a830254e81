"""Features of an image set, computed once."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from vitreg_core.data.images import class_folders
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone, Features
from vitreg_core.precision import use_precision

from vitreg_eval.config import LabelOptions, ProbeOptions, TaskOptions
from vitreg_eval.datasets import Batch, ImageSet, labelled_folder, scenes
from vitreg_eval.results import DataRecord


@dataclass(frozen=True)
class Extracted:
    """Final-normed tokens of a whole image set, in float32 on the CPU, and its targets."""

    features: Features
    targets: dict[str, Tensor]
    data: DataRecord

    @property
    def cls(self) -> Tensor:
        """Class tokens `n d`.

        Raises:
            InputError: the model has none.
        """
        if self.features.cls is None:
            raise InputError("this model has no class token, which the task reads; give a model that has one")
        return self.features.cls


def progress(image_set: ImageSet, what: str) -> Iterator[Batch]:
    """The batches of a set, with a progress bar on a terminal."""
    with tqdm(total=image_set.data.n, desc=what, unit="image", disable=None, leave=False) as bar:
        for batch in image_set.batches():
            yield batch
            bar.update(len(batch.images))


@torch.no_grad()
def extract(backbone: Backbone, image_set: ImageSet, options: TaskOptions) -> Extracted:
    """Run a frozen backbone over an image set.

    Raises:
        InputError: an image cannot be read.
    """
    found: list[Features] = []
    targets: list[dict[str, Tensor]] = []
    for batch in progress(image_set, f"features of {image_set.data.name} {image_set.data.split}"):
        with use_precision(options.precision, backbone.device):
            features = backbone.features(batch.images.to(backbone.device))
        found.append(to_cpu(features))
        targets.append(batch.targets)
    joined = {name: torch.cat([part[name] for part in targets]) for name in targets[0]}
    return Extracted(join(found), joined, image_set.data)


def to_cpu(features: Features) -> Features:
    """Features in float32 on the CPU."""
    cls = None if features.cls is None else features.cls.float().cpu()
    return Features(cls, features.registers.float().cpu(), features.patches.float().cpu(), features.grid)


def join(parts: list[Features]) -> Features:
    """One Features of several batches."""
    cls = None if parts[0].cls is None else torch.cat([part.cls for part in parts if part.cls is not None])
    registers = torch.cat([part.registers for part in parts])
    return Features(cls, registers, torch.cat([part.patches for part in parts]), parts[0].grid)


def train_and_test(backbone: Backbone, options: ProbeOptions) -> tuple[Extracted, Extracted]:
    """Features of the training and the test set that the options name.

    Raises:
        InputError: a folder is missing or empty, or train and val have other classes.
    """
    if isinstance(options, LabelOptions) and options.data is not None:
        train, test = (
            labelled_folder(backbone.preprocess, options.data, s, options.batch_size) for s in ("train", "val")
        )
        check_classes(options)
    else:
        counts = {"train": options.train_images, "test": options.test_images}
        train, test = (scenes(backbone.preprocess, count, options.seed, split) for split, count in counts.items())
    return extract(backbone, train, options), extract(backbone, test, options)


def check_classes(options: LabelOptions) -> None:
    """Refuse splits whose class folders differ, since their labels would not mean the same."""
    assert options.data is not None
    train, val = (set(class_folders(options.data / s)) for s in ("train", "val"))
    if train != val:
        raise InputError(
            f"{options.data}: class folders only in train or val: {sorted(train ^ val)[:5]}; make them equal"
        )
