"""Features on disk: one array file for each kind, written in shards of images and memory-mapped when read.

A folder holds `manifest.json` (all that the features depend on), `<name>.npy` for each kind, and in `shards` a file for
each shard whose rows are on the disk. Rows of different shards never overlap, so that processes write side by side;
whoever is killed leaves a shard that counts as missing.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from vitreg_core.errors import InputError

Rows = Mapping[str, Shaped[Tensor, "b ..."]]
SHARD = 512
"""Images of a shard: a multiple of the scenes that are drawn at a time."""


@dataclass(frozen=True)
class Layout:
    """What a shard consists of; the same for all shards of a folder."""

    grid: tuple[int, int]
    """Rows and columns of patches."""
    arrays: dict[str, tuple[str, tuple[int, ...]]]
    """Number type and shape of one image's row, by name."""


def layout(rows: Rows, grid: tuple[int, int]) -> Layout:
    """Number types and shapes of some rows."""
    kinds = {name: (values[:0].numpy().dtype.str, tuple(values.shape[1:])) for name, values in rows.items()}
    return Layout(grid, kinds)


@dataclass(frozen=True)
class Store:
    """A folder of features of so many images."""

    folder: Path
    images: int
    shard: int
    """Images of a shard."""

    @property
    def spans(self) -> list[range]:
        """The images of each shard."""
        return [range(start, min(start + self.shard, self.images)) for start in range(0, self.images, self.shard)]

    def missing(self) -> list[range]:
        """The shards that are not on the disk yet.

        Raises:
            InputError: an array has lost rows of a shard that was finished.
        """
        there = {span: self.marker(span).exists() for span in self.spans}
        finished = [span for span in there if there[span]]
        if finished:
            self.check(self.layout(finished[-1]), finished[-1].stop)
        return [span for span in there if not there[span]]

    def marker(self, span: range) -> Path:
        """The file that says that a shard is on the disk."""
        return self.folder / "shards" / f"{span.start:09}.json"

    def layout(self, span: range) -> Layout:
        """What a finished shard consists of.

        Raises:
            InputError: the file that says it is damaged.
        """
        found = read_json(self.marker(span))
        try:
            rows, columns = (int(side) for side in found["grid"])
            arrays = {
                str(name): (np.dtype(kind).str, tuple(int(side) for side in shape))
                for name, (kind, shape) in found["arrays"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError):
            raise damaged(self.marker(span)) from None
        if any(Path(name).name != name for name in arrays):
            raise damaged(self.marker(span))
        return Layout((rows, columns), arrays)

    def check(self, layout: Layout, images: int) -> None:
        """Refuse arrays that are too short for the images before an index."""
        for name, (kind, shape) in layout.arrays.items():
            path = self.path(name)
            size = path.stat().st_size if path.is_file() else -1
            if size < len(header(kind, (self.images, *shape))) + images * row_bytes(kind, shape):
                raise damaged(path)

    def path(self, name: str) -> Path:
        """File of an array."""
        return self.folder / f"{name}.npy"

    def put(self, start: int, span: range, rows: Rows, grid: tuple[int, int]) -> None:
        """Write rows of some images of a shard; with its last image the shard is finished.

        Args:
            start: index of the first of these images.
            span: images of the shard, of which the earlier ones were put before.
            rows: what is kept of the images, by name.
            grid: rows and columns of patches.

        Raises:
            InputError: the disk is full, or the folder cannot be written.
        """
        with self.writing(start):
            (self.folder / "shards").mkdir(parents=True, exist_ok=True)
            for name, values in rows.items():
                write_rows(self.path(name), start, values, self.images)
            if start + len(next(iter(rows.values()))) == span.stop:
                self.finish(span, layout(rows, grid))

    def finish(self, span: range, layout: Layout) -> None:
        """Say that the rows of a shard are there, once they are on the disk."""
        for name in layout.arrays:
            with self.path(name).open("rb") as file:
                os.fsync(file.fileno())
        write_whole(self.marker(span), json.dumps(vars(layout)) + "\n")

    @contextlib.contextmanager
    def writing(self, start: int) -> Iterator[None]:
        """Tell the user why the folder cannot be written."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be written at image {start} of {self.images} ({error.strerror}); finished "
                "shards stay: make room, or give another folder"
            ) from None

    def read(self) -> tuple[dict[str, Tensor], tuple[int, int]]:
        """All arrays, memory-mapped, and the grid of the patches. Changes to them are not written.

        Raises:
            InputError: shards are missing, or a file is damaged.
        """
        if missing := self.missing():
            raise InputError(f"{self.folder}: {len(missing)} of {len(self.spans)} shards are missing; run it again")
        layout = self.layout(self.spans[-1])
        return {name: self.map(name, *kind) for name, kind in layout.arrays.items()}, layout.grid

    def rows(self, name: str, chosen: Int[Tensor, " n"] | None = None) -> Shaped[Tensor, "n ..."]:
        """Rows of some images of one array, in memory; of all images by default.

        Raises:
            InputError: shards are missing, there is no such array, or a file is damaged.
        """
        arrays = self.layout(self.spans[-1]).arrays
        if name not in arrays:
            raise damaged(self.path(name))
        mapped = self.map(name, *arrays[name])
        return mapped.clone() if chosen is None else mapped[chosen]

    def map(self, name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        """One array, memory-mapped."""
        path, whole = self.path(name), (self.images, *shape)
        if 0 in whole:
            return torch.from_numpy(np.empty(whole, kind))
        try:
            found = np.load(path, mmap_mode="c", allow_pickle=False)
            if (found.shape, found.dtype) != (whole, np.dtype(kind)):
                raise damaged(path)
            return torch.from_numpy(found)
        except (OSError, ValueError, EOFError, TypeError):
            raise damaged(path) from None


@dataclass
class Memory:
    """Features in memory, in place of a `Store`."""

    images: int
    arrays: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    grid: tuple[int, int] = (0, 0)

    def put(self, start: int, span: range, rows: Rows, grid: tuple[int, int]) -> None:  # noqa: ARG002 (all are one)
        """Keep rows of some images, as `Store.put`; a set may have fewer images than thought."""
        self.grid = grid
        for name, values in rows.items():
            if name not in self.arrays:
                self.arrays[name] = torch.empty(self.images, *values.shape[1:], dtype=values.dtype)
            self.rows = start + len(values)
            self.arrays[name][start : self.rows] = values

    def read(self) -> tuple[dict[str, Tensor], tuple[int, int]]:
        """All arrays, and the grid of the patches."""
        return {name: values[: self.rows] for name, values in self.arrays.items()}, self.grid


def write_rows(path: Path, start: int, values: Shaped[Tensor, "b ..."], images: int) -> None:
    """Write rows into their place in an array file for so many images; what is between grows as a hole."""
    array = np.ascontiguousarray(values.numpy())
    head = header(array.dtype.str, (images, *array.shape[1:]))
    path.touch()
    with path.open("r+b", buffering=0) as file:
        write_all(file, head)
        file.seek(len(head) + start * row_bytes(array.dtype.str, array.shape[1:]))
        write_all(file, array.reshape(-1).view(np.uint8).data)


def write_all(file: io.RawIOBase, data: bytes | memoryview) -> None:
    """Write every byte; one call may write fewer."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[file.write(rest) or 0 :]


def header(kind: str, shape: Sequence[int]) -> bytes:
    """What stands before the values in an .npy file."""
    text = io.BytesIO()
    content = {"descr": kind, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(text, content)
    return text.getvalue()


def row_bytes(kind: str, shape: Sequence[int]) -> int:
    """Bytes of one image's row."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize


def write_whole(path: Path, text: str) -> None:
    """Write a file whole, also where another process writes the same one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of names and values.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise damaged(path) from None
    if not isinstance(found, dict):
        raise damaged(path)
    return found


def damaged(path: Path) -> InputError:
    """What the user is told of a file that cannot be used."""
    return InputError(f"{path}: missing or damaged; delete the folder that it is in, and run again")
