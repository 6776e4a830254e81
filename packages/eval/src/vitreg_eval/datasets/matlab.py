"""Variables of MATLAB 5 files: numbers, texts, cells and structures, as lists of labels have them.

SciPy reads these files, too, but some damaged ones end the whole process in it; here they end in one line.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from vitreg_core.errors import InputError

Value: TypeAlias = np.ndarray | str | list[Any] | dict[str, list[Any]]
HEADER = 128
COMPRESSED, MATRIX = 15, 14
CELL, STRUCTURE, TEXT = 1, 2, 4
NUMBERS = range(6, 16)
"""Classes of matrices of numbers."""
TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
ENCODINGS = {1: "latin1", 2: "latin1", 4: "utf-16-{}", 16: "utf-8", 17: "utf-16-{}", 18: "utf-32-{}"}
"""Of the types that texts have; to be filled in with the order of the bytes."""
MOST = 1 << 28
"""Bytes that one compressed variable may unpack to."""
DEEPEST = 8
"""Levels of cells and structures."""


def read_variable(path: Path, key: str) -> Value:
    """A variable of a file.

    Returns:
        A flat array for a matrix of numbers, a text, a list for cells, and for structures a list of each field.

    Raises:
        InputError: the file is missing or damaged, of another format, or has no such variable.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); unpack the data set again") from None
    order = {b"IM": "<", b"MI": ">"}.get(content[HEADER - 2 : HEADER])
    if order is None:
        raise InputError(f"{path}: no MATLAB 5 file; unpack the data set again, or save it with -v7")
    try:
        for matrix in variables(content[HEADER:], order):
            if matrix.name == key:
                return read_value(matrix, order, 0)
    except (ValueError, LookupError, struct.error, zlib.error, StopIteration, RuntimeError, OverflowError):
        raise InputError(f"{path}: damaged; unpack the data set again") from None
    raise InputError(f"{path}: holds no {key!r}; unpack the data set again")


@dataclass(frozen=True)
class Matrix:
    """What all variables have, and their content."""

    kind: int
    count: int
    """Numbers, letters, cells or structures."""
    name: str
    rest: Iterator[tuple[int, bytes]]
    """Elements that follow."""


def variables(content: bytes, order: str) -> Iterator[Matrix]:
    """The variables of a file."""
    for kind, data in elements(content, order):
        if kind == COMPRESSED:
            yield from variables(zlib.decompressobj().decompress(data, MOST), order)
        elif kind == MATRIX:
            yield open_matrix(data, order)


def elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and bytes of each element; those of up to four bytes share eight with their type."""
    at = 0
    while at < len(content):
        (tag,) = struct.unpack_from(f"{order}I", content, at)
        size, start = tag >> 16, at + 4
        if not size:
            (size,) = struct.unpack_from(f"{order}I", content, at + 4)
            start = at + 8
        if start + size > len(content):
            raise ValueError("an element reaches beyond the end")
        yield tag & 0xFFFF, content[start : start + size]
        aligned = size if tag == COMPRESSED else size + -size % 8
        at = at + 8 if tag >> 16 else start + aligned


def open_matrix(content: bytes, order: str) -> Matrix:
    """Class, size and name of a matrix."""
    parts = elements(content, order)
    flags, shape, name = next(parts)[1], next(parts)[1], next(parts)[1]
    (kind,) = struct.unpack_from(f"{order}I", flags)
    return Matrix(kind & 0xFF, math.prod(np.frombuffer(shape, f"{order}i4").tolist()), name.decode("latin1"), parts)


def read_value(matrix: Matrix, order: str, depth: int) -> Value:
    """The content of a matrix."""
    if depth > DEEPEST:
        raise ValueError("too deep")
    if matrix.kind == CELL:
        return [read_inner(matrix, order, depth) for _ in range(matrix.count)]
    if matrix.kind == STRUCTURE:
        return read_structures(matrix, order, depth)
    kind, data = next(matrix.rest)
    if matrix.kind == TEXT:
        wide = {"<": "le", ">": "be"}[order]
        return data.decode(ENCODINGS[kind].format(wide))
    values = np.frombuffer(data, f"{order}{TYPES[kind]}")
    if matrix.kind not in NUMBERS or len(values) != matrix.count:
        raise ValueError("not as many numbers as announced")
    return values


def read_inner(matrix: Matrix, order: str, depth: int) -> Value:
    """The next matrix within a matrix; one without content is empty."""
    kind, data = next(matrix.rest)
    if kind != MATRIX:
        raise ValueError("no matrix within a matrix")
    return read_value(open_matrix(data, order), order, depth + 1) if data else np.empty(0)


def read_structures(matrix: Matrix, order: str, depth: int) -> dict[str, list[Value]]:
    """Field by field what the structures of a matrix hold, which the file has structure by structure."""
    (length,) = struct.unpack_from(f"{order}i", next(matrix.rest)[1])
    names = next(matrix.rest)[1]
    fields = [names[at : at + length].partition(b"\0")[0].decode("latin1") for at in range(0, len(names), length)]
    rows = [[read_inner(matrix, order, depth) for _ in fields] for _ in range(matrix.count if fields else 0)]
    return {field: [row[index] for row in rows] for index, field in enumerate(fields)}
