"""CIFAR-10, and CIFAR-100 by its 100 fine classes, from the official files: pickled ones or the binary version."""

import codecs
import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from vitreg_core.errors import InputError

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.layouts import Layout, lines
from vitreg_eval.results import DataRecord

PIXELS = 3 * 32 * 32
"""Bytes of an image: the red, the green and the blue plane."""
RECONSTRUCT = np.empty(0).__reduce__()[0]
ALLOWED: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


class ArraysOnly(pickle.Unpickler):
    """Reads a pickle of numbers, texts, lists, dictionaries and NumPy arrays.

    A pickle may call whatever it can name. This one can name only what NumPy's arrays are made with, none of which
    runs code or opens files; any other name is refused before anything of it is imported.
    """

    def find_class(self, module: str, name: str) -> object:
        """The few things that a pickle may name."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ALLOWED[module, name]


@dataclass(frozen=True)
class Version:
    """Names in the official files of a data set."""

    name: str
    classes: int
    pickled: Mapping[str, tuple[str, ...]]
    """Pickled files of each split."""
    binary: Mapping[str, tuple[str, ...]]
    """Binary files of each split."""
    meta: tuple[str, str]
    """Pickled file with the names of the classes, and the key to them."""
    names: str
    """The same as text, in the binary version."""
    labels: str
    """Key to the classes of a pickled file."""
    label_bytes: int
    """Bytes before each image of a binary file; the last is its class."""


BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEN = Version(
    name="cifar10",
    classes=10,
    pickled={"train": BATCHES, "val": ("test_batch",)},
    binary={"train": tuple(f"{name}.bin" for name in BATCHES), "val": ("test_batch.bin",)},
    meta=("batches.meta", "label_names"),
    names="batches.meta.txt",
    labels="labels",
    label_bytes=1,
)
HUNDRED = Version(
    name="cifar100",
    classes=100,
    pickled={"train": ("train",), "val": ("test",)},
    binary={"train": ("train.bin",), "val": ("test.bin",)},
    meta=("meta", "fine_label_names"),
    names="fine_label_names.txt",
    labels="fine_labels",
    label_bytes=2,
)


def cifar_reader(version: Version) -> Callable[[Path, str], Examples]:
    """What reads a split of one of the two data sets, from the folder that holds the files."""

    def read(root: Path, split: str) -> Examples:
        """A split, in memory: 150 MB for training.

        Raises:
            InputError: a file is missing or damaged.
        """
        pickled = (root / version.meta[0]).is_file()
        files = (version.pickled if pickled else version.binary)[split]
        read_file = read_pickled if pickled else read_binary
        parts = [checked(version, root / file, *read_file(version, root / file)) for file in files]
        names = [f"{file} image {index}" for file, part in zip(files, parts, strict=True) for index in range(len(part))]
        together = np.concatenate(parts)
        return examples(version, {"train": "train", "val": "test"}[split], together, names, class_names(version, root))

    return read


def examples(
    version: Version, split: str, rows: UInt8[np.ndarray, "n bytes"], names: list[str], classes: list[str]
) -> Examples:
    """Examples of rows that hold a class and the three planes of an image."""

    def read(index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(rows[index, 1:].reshape(3, 32, 32).transpose(1, 2, 0)))

    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    record = DataRecord(name=version.name, split=split, n=len(rows), hash=digest)
    return Examples(record, tuple(classes), torch.from_numpy(rows[:, 0].astype(np.int64)), read, names)


def checked(
    version: Version, path: Path, labels: Int[np.ndarray, " n"], pixels: UInt8[np.ndarray, "n 3072"]
) -> UInt8[np.ndarray, "n bytes"]:
    """Class and pixels of a file's images, in one row each.

    Raises:
        InputError: no images, or a class out of range.
    """
    if not len(labels):
        raise InputError(f"{path}: holds no images; unpack the data set again")
    if labels.min() < 0 or labels.max() >= version.classes:
        wrong = int(labels[(labels < 0) | (labels >= version.classes)][0])
        raise InputError(f"{path}: class {wrong} is not in 0 to {version.classes - 1}; unpack the data set again")
    return np.concatenate([labels.astype(np.uint8)[:, None], pixels], axis=1)


def read_pickled(version: Version, path: Path) -> tuple[Int[np.ndarray, " n"], UInt8[np.ndarray, "n 3072"]]:
    """Classes and pixels of a pickled file.

    Raises:
        InputError: it is missing or damaged, or holds something else.
    """
    content = unpickle(path)
    pixels, labels = content.get("data"), content.get(version.labels)
    if (
        isinstance(pixels, np.ndarray)
        and isinstance(labels, list)
        and pixels.dtype == np.uint8
        and pixels.shape == (len(labels), PIXELS)
        and all(isinstance(label, int) and abs(label) < 2**31 for label in labels)
    ):
        return np.array(labels, dtype=np.int64), pixels
    raise InputError(f"{path}: not {PIXELS} bytes and a class for each image; unpack the data set again")


def read_binary(version: Version, path: Path) -> tuple[Int[np.ndarray, " n"], UInt8[np.ndarray, "n 3072"]]:
    """Classes and pixels of a file of the binary version.

    Raises:
        InputError: it is missing, or its size is not that of whole images.
    """
    try:
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); unpack the data set again") from None
    row = version.label_bytes + PIXELS
    if len(content) % row:
        raise InputError(f"{path}: {len(content)} bytes are not a multiple of {row}; unpack the data set again")
    rows = content.reshape(-1, row)
    return rows[:, version.label_bytes - 1].astype(np.int64), rows[:, version.label_bytes :]


def class_names(version: Version, root: Path) -> list[str]:
    """Names of the classes.

    Raises:
        InputError: their file is missing or damaged, or has another number of them.
    """
    file, key = version.meta
    pickled = (root / file).is_file()
    path = root / (file if pickled else version.names)
    found = unpickle(path).get(key) if pickled else lines(path)
    if not isinstance(found, list) or len(found) != version.classes:
        raise InputError(f"{path}: not the names of {version.classes} classes; unpack the data set again")
    return [str(name) for name in found]


def unpickle(path: Path) -> dict[str, object]:
    """Content of a pickled file of Python 2 or 3.

    Raises:
        InputError: it is missing, damaged, or asks for more than arrays.
    """
    try:
        with path.open("rb") as file:
            content = ArraysOnly(file, encoding="latin1").load()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); unpack the data set again") from None
    except Exception as error:  # damaged pickles make it stumble in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a pickle of arrays ({reason}); take the official file") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no dictionary; take the official file")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


CIFAR10 = Layout(("test_batch", "test_batch.bin"), cifar_reader(TEN), {"train": 50000, "test": 10000})
CIFAR100 = Layout(("meta", "fine_label_names.txt"), cifar_reader(HUNDRED), {"train": 50000, "test": 10000})
