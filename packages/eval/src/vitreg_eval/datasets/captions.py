"""Images with captions: a table of files and titles, or annotations in the layout of COCO."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from vitreg_core.data.images import Preprocess, read_image
from vitreg_core.errors import InputError

from vitreg_eval.datasets import ImageSet, image_set
from vitreg_eval.datasets.examples import Examples
from vitreg_eval.results import DataRecord
from vitreg_eval.text_files import read_text

COLUMNS = ("filepath", "title")


class Row(NamedTuple):
    """One caption of one image."""

    image: Path
    text: str
    place: str
    """What tells it in messages."""


@dataclass(frozen=True)
class Captioned:
    """Images, each with one caption or more."""

    data: DataRecord
    paths: tuple[Path, ...]
    texts: tuple[str, ...]
    """All captions."""
    owners: Int[Tensor, " m"]
    """Index of the image that each caption belongs to; every image has one at least."""
    notes: tuple[str, ...] = ()
    """What the reader must know of the captions."""

    def images(self, preprocess: Preprocess, batch_size: int) -> ImageSet:
        """The images as a model reads them; reading raises InputError where one cannot be."""
        examples = Examples(
            data=self.data,
            classes=(),
            labels=torch.arange(len(self.paths)),
            read=lambda index: read_image(self.paths[index]),
            names=[str(path) for path in self.paths],
        )
        return image_set(examples, preprocess, batch_size)


def open_captions(file: Path, images: Path | None = None) -> Captioned:
    """Images and captions of a list.

    Args:
        file: a table with a header, of tabs or commas, whose columns `filepath` (below the folder of the table, or
            absolute) and `title` are read; or a .json in the layout of COCO's captions.
        images: folder of the images of a .json, in place of the places where COCO has them.

    Raises:
        InputError: the file cannot be read or is something else, an image of it is not there, or there is no caption.
    """
    content = read_text(file, "a table of filepath and title, or COCO annotations")
    is_json = file.suffix.lower() == ".json"
    if images is not None and not is_json:
        raise InputError(f"--images {images} with {file}: a table says where its images are; leave it out")
    rows = list(coco_rows(file, content, images) if is_json else table_rows(file, content))
    there = [row for row in rows if row.text]
    if not there:
        raise InputError(f"{file}: no caption in it; give a list with images and captions")
    empty = len(rows) - len(there)
    return collect(file, there, [f"{empty} empty captions were left out"] if empty else [])


def table_rows(file: Path, content: str) -> Iterator[Row]:
    """Rows of a table.

    Raises:
        InputError: a column is missing, or a row has other columns than the header.
    """
    header = content.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter="\t" if "\t" in header else ",", strict=True)
    try:
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise InputError(f"{file}: no column {missing[0]} in its header {header.strip()[:80]!r}; name it so")
        for row in reader:
            name, title = (row[column] for column in COLUMNS)
            if not name or title is None or None in row:
                raise InputError(f"{file}: line {reader.line_num} has other columns than the header; mend it")
            yield Row(file.parent / name, " ".join(title.split()), f"line {reader.line_num}")
    except csv.Error as error:
        raise InputError(f"{file}: line {reader.line_num} cannot be read ({error}); mend it") from None


def coco_rows(file: Path, content: str, images: Path | None) -> Iterator[Row]:
    """Captions of COCO's annotations, by image.

    Raises:
        InputError: not such a file, or its images are not found.
    """
    try:
        found: Any = json.loads(content)
        names = {entry["id"]: str(entry["file_name"]) for entry in found["images"]}
        captions = [(entry["image_id"], str(entry["caption"])) for entry in found["annotations"]]
        pairs = [(names[image], text) for image, text in captions]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:120]
        raise InputError(
            f"{file}: no annotations of captions as COCO's ({reason}); give captions_val2017.json"
        ) from None
    folder = images or image_folder(file, [name for name, _ in pairs[:1]])
    for name, text in pairs:
        yield Row(folder / name, " ".join(text.split()), name)


def image_folder(file: Path, names: list[str]) -> Path:
    """Where the first image of annotations lies: in a folder named like them, beside or above.

    Raises:
        InputError: nowhere; names the places.
    """
    part = file.stem.removeprefix("captions_")
    root = file.absolute().parent
    places = [base / below for base in (root.parent, root) for below in (part, f"images/{part}", "images", "")]
    for place in places:
        if all((place / name).is_file() for name in names):
            return place
    raise InputError(f"{file}: its images are not in {places[0]} or {places[1]}; give --images DIR")


def collect(file: Path, rows: Iterable[Row], notes: list[str]) -> Captioned:
    """Group captions by image, both in the order of the list.

    Raises:
        InputError: an image that is not there.
    """
    paths: dict[str, int] = {}
    texts, owners, digest = [], [], hashlib.sha256()
    for row in rows:
        name = os.path.normpath(row.image)
        if name not in paths:
            paths[name] = len(paths)
            digest.update(f"{row.image.name} {size(file, row)}\n".encode(errors="surrogateescape"))
        texts.append(row.text)
        owners.append(paths[name])
        digest.update(f"{paths[name]} {row.text}\n".encode(errors="surrogatepass"))
    record = DataRecord(name=file.absolute().parent.name, split=file.stem, n=len(paths), hash=digest.hexdigest())
    return Captioned(record, tuple(map(Path, paths)), tuple(texts), torch.tensor(owners), tuple(notes))


def size(file: Path, row: Row) -> int:
    """Bytes of an image.

    Raises:
        InputError: it is not there.
    """
    try:
        return row.image.stat().st_size
    except (OSError, ValueError):
        raise InputError(
            f"{file}: {row.place}: there is no {row.image}; put the image there, or remove its captions"
        ) from None
