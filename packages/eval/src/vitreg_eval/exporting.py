"""Features in the files of other programs, written in parts, so that they never need to fit into memory."""

import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_core.extras import require

CHUNK = 2**26
"""Bytes that are copied at a time."""
LONGEST_HEADER = 100_000_000
"""Bytes that readers of safetensors allow before the values."""
KINDS = {"float32": "F32", "float16": "F16", "int64": "I64"}
"""Number types as safetensors names them."""


@dataclass(frozen=True)
class Embedded:
    """Features of images, by kind of token, and what is known of the images."""

    tokens: dict[str, Float[Tensor, "n ..."]]
    """cls and mean_patch `n d`, registers `n r d`, patches `n p d`."""
    labels: Int[Tensor, " n"] | Int[Tensor, "n classes"] | None
    names: list[str]
    classes: tuple[str, ...]
    """Names of the classes that labels count; empty without labels."""
    grid: tuple[int, int]
    """Rows and columns of patches."""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Tokens and labels."""
        tokens = {name: values.numpy() for name, values in self.tokens.items()}
        return tokens if self.labels is None else tokens | {"labels": self.labels.numpy()}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary file that gets its name when it is complete.

    Raises:
        InputError: it cannot be written; what stood there is left as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room, or give another --out") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_npz(path: Path, found: Embedded) -> None:
    """Arrays for numpy.load: tokens by name, `names`, `grid`, and where there are labels `labels` and `classes`."""
    known = {"names": np.array(found.names), "grid": np.array(found.grid)}
    if found.labels is not None:
        known["classes"] = np.array(found.classes)
    with whole(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, values in (found.arrays | known).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, values, allow_pickle=False)


def write_safetensors(path: Path, found: Embedded) -> None:
    """Tokens and `labels` by name; the metadata hold `names`, `classes` and `grid` as JSON.

    Raises:
        InputError: more names than the format has room for, or the file cannot be written.
    """
    known = {"names": found.names, "classes": found.classes, "grid": found.grid}
    content: dict[str, Any] = {"__metadata__": {name: json.dumps(values) for name, values in known.items()}}
    end = 0
    for name, values in found.arrays.items():
        start, end = end, end + values.nbytes
        content[name] = {"dtype": KINDS[values.dtype.name], "shape": values.shape, "data_offsets": [start, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise InputError(f"{path}: {len(found.names)} names are too many for safetensors; give --format npz")
    with whole(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in found.arrays.values():
            for rows in chunks(len(values), values.nbytes):
                file.write(np.ascontiguousarray(values[rows]).data)


def write_parquet(path: Path, found: Embedded) -> None:
    """A row for each image: `name`, `label`, `class` and the tokens as lists of numbers, row by row.

    The metadata of the file hold the `shape` of each kind of token, and the `grid`.

    Raises:
        InputError: pyarrow is not installed, or the file cannot be written.
    """
    pa = require("pyarrow", "parquet", "--format parquet", package="vitreg-eval")
    parquet = require("pyarrow.parquet", "parquet", "--format parquet", package="vitreg-eval")
    shapes = {name: values.shape[1:] for name, values in found.tokens.items()}
    known = {"grid": json.dumps(found.grid), "shape": json.dumps(shapes)}
    total = sum(values.nbytes for values in found.arrays.values())
    with whole(path) as temporary:
        writer = None
        for rows in chunks(len(found.names), total):
            table = pa.table(columns(pa, found, rows)).replace_schema_metadata(known)
            writer = writer or parquet.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
        if writer:
            writer.close()


def columns(pa: Any, found: Embedded, rows: slice) -> dict[str, Any]:  # noqa: ANN401 (pyarrow)
    """Some rows of the table."""
    made: dict[str, Any] = {"name": pa.array(found.names[rows], pa.string())}
    if found.labels is not None:
        labels = found.labels[rows].numpy()
        made["label"] = pa.array(labels) if labels.ndim == 1 else fixed_lists(pa, labels)
        if labels.ndim == 1:
            made["class"] = pa.array([found.classes[label] for label in labels.tolist()], pa.string())
    return made | {name: fixed_lists(pa, values[rows].numpy()) for name, values in found.tokens.items()}


def fixed_lists(pa: Any, values: np.ndarray) -> Any:  # noqa: ANN401 (pyarrow)
    """One list of numbers for each row."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), flat.size // max(len(values), 1))


def chunks(count: int, size: int) -> Iterator[slice]:
    """Rows in parts of about `CHUNK` bytes, all of them having `size`."""
    step = max(1, CHUNK * count // max(size, 1))
    for start in range(0, count, step):
        yield slice(start, start + step)


WRITERS: dict[str, Callable[[Path, Embedded], None]] = {
    "npz": write_npz,
    "parquet": write_parquet,
    "safetensors": write_safetensors,
}
