"""Data sets of the Hugging Face hub, through `datasets`: a column of images and a column of classes.

`datasets` keeps what it fetched in its cache ($HF_HOME) and reads from there when there is no network. Data sets that
need a script of their own do not load.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from vitreg_core.data.images import decode_image, read_image
from vitreg_core.errors import InputError
from vitreg_core.extras import require

from vitreg_eval.config.datasets import HUB
from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.folders import TEST, TRAIN, VAL
from vitreg_eval.results import DataRecord

NAME = re.compile(r"hub:(?P<repository>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<train>\w+),(?P<val>\w+))?")
LABELS = ("label", "labels", "fine_label", "cls")
"""Usual names of the column of classes; CIFAR-100 has a fine and a coarse one."""


@dataclass(frozen=True)
class HubName:
    """A data set of the hub and what of it to use."""

    text: str
    repository: str
    config: str | None
    splits: dict[str, tuple[str, ...]]
    """Names that a split may have, the most fitting first."""


def open_hub(text: str, split: str) -> Examples:
    """A split of a data set of the hub.

    Args:
        text: hub:ORG/NAME[:CONFIG][@TRAIN,VAL]; the splits are train and, in this order, validation or test, if not
            given.
        split: `train`, or `val` for what numbers are reported on.

    Raises:
        InputError: `datasets` is not installed, there is no such data set or split, or its columns do not fit.
    """
    name = parse(text)
    tables = load(name)
    found = next((part for part in name.splits[split] if part in tables), None)
    if found is None:
        raise InputError(f"{text}: no split {name.splits[split][0]} among {', '.join(tables)}; give @TRAIN,VAL")
    return examples(name, found, tables[found])


def parse(text: str) -> HubName:
    """Take a name apart.

    Raises:
        InputError: it has another form, or the same split twice.
    """
    match = NAME.fullmatch(text)
    if match is None or match["train"] == match["val"] is not None:
        raise InputError(f"{text}: give {HUB}ORG/NAME[:CONFIG][@TRAIN,VAL], with two different splits")
    train, val = (TRAIN, (*VAL, *TEST)) if match["train"] is None else ((match["train"],), (match["val"],))
    return HubName(text, match["repository"], match["config"], {"train": train, "val": val})


def load(name: HubName) -> Any:  # noqa: ANN401, a type of `datasets`
    """All splits, by name."""
    datasets = require("datasets", "datasets", name.text, package="vitreg-eval")
    try:
        return datasets.load_dataset(name.repository, name.config)
    except Exception as error:  # the library, its readers and its network raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{name.text}: cannot be loaded ({reason}); check its name and the network") from None


def examples(name: HubName, split: str, table: Any) -> Examples:  # noqa: ANN401, as above
    """Examples of the rows of a split.

    Raises:
        InputError: no rows, rows without a class, or columns that do not fit.
    """
    image, label = columns(name.text, table)
    labels = np.asarray(table.with_format("numpy")[label][:])
    if not len(labels):
        raise InputError(f"{name.text}: split {split} has no rows; give @TRAIN,VAL with others")
    classes = table.features[label].names
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(classes):
        raise InputError(f"{name.text}: split {split} has rows without a class; give @TRAIN,VAL with labelled ones")
    rows = table.select_columns([image])
    rows = rows.cast_column(
        image, require("datasets", "datasets", name.text, package="vitreg-eval").Image(decode=False)
    )
    names = [f"{name.text} {split} row {index}" for index in range(len(labels))]

    def read(index: int) -> Image.Image:
        file = rows[index][image] or {"bytes": b"", "path": None}
        if file["bytes"] is None and file["path"]:
            return read_image(Path(file["path"]))
        return decode_image(file["bytes"] or b"", names[index])

    record = DataRecord(name=name.text, split=split, n=len(labels), hash=fingerprint(rows, image, labels))
    return Examples(record, tuple(classes), torch.from_numpy(labels.astype(np.int64)), read, names)


def columns(text: str, table: Any) -> tuple[str, str]:  # noqa: ANN401, as above
    """Names of the columns of images and of classes.

    Raises:
        InputError: one of them is missing, or there are several.
    """
    datasets = require("datasets", "datasets", text, package="vitreg-eval")
    images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise InputError(f"{text}: no column of images among {', '.join(table.features)}; give another data set")
    labels = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    chosen = [name for name in LABELS if name in labels] or labels
    if not chosen or (len(labels) > 1 and chosen[0] not in LABELS):
        raise InputError(f"{text}: no column of classes called label among {', '.join(table.features)}; give another")
    return images[0], chosen[0]


def fingerprint(rows: Any, image: str, labels: np.ndarray) -> str:  # noqa: ANN401, as above
    """SHA-256 over the sizes and names of the image files and their classes, without reading the images."""
    lengths = require("pyarrow.compute", "datasets", HUB, package="vitreg-eval").binary_length
    digest = hashlib.sha256(labels.astype(np.int64).tobytes())
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        column = batch[image].combine_chunks()
        names = [path and Path(path).name for path in column.field("path").to_pylist()]
        digest.update(repr((names, lengths(column.field("bytes")).to_pylist())).encode())
    return digest.hexdigest()
