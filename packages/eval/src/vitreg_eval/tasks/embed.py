"""Features of images in a file for other programs."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from vitreg_core.data.images import list_images
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone

from vitreg_eval.config.embed import EmbedOptions
from vitreg_eval.datasets import ImageSet, image_set, photo_folder
from vitreg_eval.datasets.labelled import open_labelled
from vitreg_eval.exporting import WRITERS, Embedded
from vitreg_eval.extract import Extracted, extract
from vitreg_eval.manifest import claim, describe
from vitreg_eval.processes import refuse_without_cache
from vitreg_eval.results import Outcome, is_main_process
from vitreg_eval.tokens import Wanted

PARTIAL = "features.partial"
"""Folder in `out` with what is computed so far; nothing else of `out` is touched."""
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Named:
    """Images to embed, and what is written beside their features."""

    images: ImageSet
    names: Sequence[str]
    classes: tuple[str, ...] = ()


def run(backbone: Backbone, options: EmbedOptions, out: Path) -> Outcome:
    """Write features.<format>; what is computed on the way is kept in `out` until it is complete, or in the cache.

    Raises:
        InputError: a token is wanted that the model does not have, an image cannot be read, `out` holds features of
            another model or other images, or it cannot be written.
    """
    if options.cache is None:
        refuse_without_cache()
    if "registers" in options.tokens and not backbone.num_registers:
        raise InputError(f"--tokens {','.join(options.tokens)}: this model has no registers; leave them out")
    named = open_named(backbone, options)
    wanted = Wanted((options.layer,), norm=options.norm, parts=options.tokens, dtype=DTYPES[options.dtype])
    manifest = describe(backbone, named.images, options.precision, wanted.record(backbone))
    claim(out, manifest)
    found = extract(backbone, named.images, options, wanted, options.cache or out / PARTIAL)
    path = out / f"features.{options.format}"
    if is_main_process():
        WRITERS[options.format](path, embedded(found, named))
    if options.cache is None:
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
    return Outcome({}, found.data, [f"{', '.join(options.tokens)} of {len(found)} images in {path}"])


def open_named(backbone: Backbone, options: EmbedOptions) -> Named:
    """The images of the options.

    Raises:
        InputError: a folder is missing, empty or damaged.
    """
    if options.images is not None:
        paths = list_images(options.images)
        photos = photo_folder(backbone.preprocess, options.images, None, options.batch_size)
        return Named(photos, [path.relative_to(options.images).as_posix() for path in paths])
    examples = open_labelled(options.dataset, options.data, options.split)
    images = image_set(examples, backbone.preprocess, options.batch_size)
    return Named(images, examples.names, examples.classes)


def embedded(found: Extracted, named: Named) -> Embedded:
    """Features as they are written: without the dimension of the layers, of which there is one."""
    tokens = {name: values[:, 0] for name, values in found.parts.items()}
    labels: Tensor | None = found.targets.get("label")
    return Embedded(tokens, labels, list(named.names), named.classes, found.grid)
