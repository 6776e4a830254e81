"""Images and captions as rows: .csv and .tsv files that name images, and data sets with both in them."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vitreg_core.data.images import read_image
from vitreg_core.errors import InputError

from vitreg_recipes.data.tables import TableImages

FILE = "filepath"
"""Column of a .csv or .tsv that names the image."""
TEXT_NAMES = ("caption", "title", "text", "txt")
"""Columns, or entries of a key.json, that hold the caption; the first that is there."""
SEPARATORS = ("\t", ",", ";")


class Strings:
    """Many texts in two arrays, which workers share with their parent."""

    def __init__(self, texts: Iterable[str]) -> None:
        parts = [text.encode(errors="replace") for text in texts]
        self.ends = np.cumsum([0, *map(len, parts)])
        self.data = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.data[self.ends[index] : self.ends[index + 1]].tobytes().decode()


class ListedCaptions:
    """Images that tables name, each with a caption; paths are relative to the table.

    Raises:
        InputError: a table cannot be read, or lacks a column.
    """

    def __init__(self, where: str, tables: list[Path], text: str | None) -> None:
        self.where = where
        rows = [(str(table.parent / path), caption) for table in tables for path, caption in read_rows(table, text)]
        kept = [(path, caption) for path, caption in rows if caption and not os.path.isdir(path)]  # noqa: PTH112 (speed)
        self.dropped = len(rows) - len(kept)
        self.paths = Strings(path for path, _ in kept)
        self.captions = Strings(caption for _, caption in kept)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Path of an image."""
        return self.paths[index]

    def read(self, index: int) -> Image.Image:
        """Read an image.

        Raises:
            InputError: it cannot be read.
        """
        return read_image(Path(self.paths[index]))

    def caption(self, index: int) -> str:
        """Caption of an image."""
        return self.captions[index]


def read_rows(table: Path, text: str | None) -> Iterator[tuple[str, str]]:
    """Path and caption in every row; either is empty where it is missing.

    Raises:
        InputError: the file cannot be read, its columns are missing, or a row is broken.
    """
    try:
        with table.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            header = file.readline().rstrip("\r\n")
            separator = max(SEPARATORS, key=header.count)
            names = next(csv.reader([header], delimiter=separator, strict=True), [])
            path, caption = places(table, names, text)
            for row in csv.reader(file, delimiter=separator, strict=True):
                if row:
                    values = (row[place].strip() if place < len(row) else "" for place in (path, caption))
                    yield tuple(values)  # type: ignore[misc]
    except (OSError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read as a table ({error}); mend or replace it") from None


def places(table: Path, names: Sequence[str], text: str | None) -> tuple[int, int]:
    """Numbers of the columns of paths and captions.

    Raises:
        InputError: one is missing.
    """
    column = next((name for name in ((text,) if text else TEXT_NAMES) if name in names), None)
    if FILE not in names or column is None:
        raise InputError(
            f"{table}: columns {FILE} and {text or 'title'} not found among {', '.join(names)[:200] or 'none'}; name "
            "them so in the first line, or give data.text"
        )
    return names.index(FILE), names.index(column)


class HubCaptions:
    """Rows of a `datasets.Dataset` with an image and a caption.

    Raises:
        InputError: no column of images, or none of captions.
    """

    def __init__(self, where: str, table: Any, text: str | None) -> None:  # noqa: ANN401 (a type of `datasets`)
        self.where = where
        self.images = TableImages(where, table)
        column = text_column(where, list(table.features), text)
        captions = table.select_columns([column])[column][:]
        if not all(caption is None or isinstance(caption, str) for caption in captions):
            raise InputError(f"data.path={where}: column {column} holds no texts; give one caption a row (data.text)")
        self.rows = np.array([row for row, caption in enumerate(captions) if caption and caption.strip()], dtype=int)
        self.captions = Strings(captions[row].strip() for row in self.rows)
        self.dropped = len(captions) - len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Number of the row, and the name of its file where it has one."""
        return self.images.name(int(self.rows[index]))

    def read(self, index: int) -> Image.Image:
        """Read an image.

        Raises:
            InputError: it cannot be read.
        """
        return self.images.read(int(self.rows[index]))

    def caption(self, index: int) -> str:
        """Caption of an image."""
        return self.captions[index]


def text_column(where: str, names: Sequence[str], text: str | None) -> str:
    """The column of captions.

    Raises:
        InputError: there is none.
    """
    found = next((name for name in ((text,) if text else TEXT_NAMES) if name in names), None)
    if found is None:
        raise InputError(
            f"data.path={where}: no column {text or 'caption'} among {', '.join(names)}; name that of the captions "
            "with data.text"
        )
    return found
