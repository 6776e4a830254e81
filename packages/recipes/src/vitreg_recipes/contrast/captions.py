"""Images with captions, wherever they lie: tables, shards, parquet files, data sets of the hub, or several of these."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image
from vitreg_core.errors import InputError

from vitreg_recipes.contrast.shards import ShardCaptions
from vitreg_recipes.contrast.tables import HubCaptions, ListedCaptions
from vitreg_recipes.data import HUB, matching
from vitreg_recipes.data.reading import Pictures
from vitreg_recipes.data.tables import load

JOIN = "::"
MOST_FILES = 1_000_000
"""Files that braces may stand for."""
BRACES = re.compile(r"\{([^{}]*)\}")


@runtime_checkable
class Captioned(Pictures, Protocol):
    """Images with captions that can be read in any order."""

    dropped: int
    """Samples left out: without a caption, with an empty one, or without an image."""

    def caption(self, index: int) -> str:
        """Caption of an image.

        Raises:
            InputError: it cannot be read.
        """


class Joined:
    """Several sources, one after the other."""

    def __init__(self, sources: list[Captioned]) -> None:
        self.sources = sources
        self.where = JOIN.join(source.where for source in sources)
        self.dropped = sum(source.dropped for source in sources)
        self.ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def find(self, index: int) -> tuple[Captioned, int]:
        """The source of an image, and its place there."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.sources[number], index - (int(self.ends[number - 1]) if number else 0)

    def name(self, index: int) -> str:
        """What a user knows an image by."""
        source, place = self.find(index)
        return source.name(place)

    def read(self, index: int) -> Image.Image:
        """Read an image.

        Raises:
            InputError: it cannot be read.
        """
        source, place = self.find(index)
        return source.read(place)

    def caption(self, index: int) -> str:
        """Caption of an image.

        Raises:
            InputError: it cannot be read.
        """
        source, place = self.find(index)
        return source.caption(place)


def open_captions(path: str, text: str | None) -> Captioned:
    """Find images with captions.

    Args:
        path: `data.path` of a run; sources are joined by `::`.
        text: column, or entry of key.json, that holds the captions; None takes the usual names.

    Raises:
        InputError: there is nothing, no caption, or more samples without caption or image than with both.
    """
    sources = [open_source(part, text) for part in path.split(JOIN)]
    for source in sources:
        if source.dropped > len(source) or not len(source):
            raise InputError(
                f"{source.where}: {source.dropped} of {source.dropped + len(source)} samples lack a caption or an "
                "image; give each image a caption, as key.txt, in key.json, or in a column (data.text names it)"
            )
    return sources[0] if len(sources) == 1 else Joined(sources)


def open_source(path: str, text: str | None) -> Captioned:
    """Find the images of one source, by the form of its path."""
    if path.startswith(HUB):
        return HubCaptions(path, load(path, path.removeprefix(HUB), None), text)
    path = str(Path(path, "*.tar")) if Path(path).is_dir() else path
    if path.endswith(".tar"):
        return ShardCaptions(path, list(files(path)), text)
    if path.endswith(".parquet"):
        return HubCaptions(path, load(path, "parquet", [str(file) for file in files(path)]), text)
    if path.endswith((".csv", ".tsv")):
        return ListedCaptions(path, list(files(path)), text)
    raise InputError(
        f"data.path={path}: no images with captions; give scenes, a table (.csv or .tsv), shards such as "
        "'path/{00000..00331}.tar', a folder of shards, 'path/*.parquet', or hub:org/name, in quotes"
    )


def files(path: str) -> Iterator[Path]:
    """Files of a path with braces and patterns.

    Raises:
        InputError: one of them is missing.
    """
    for pattern in itertools.islice(braces(path), MOST_FILES):
        yield from matching(pattern)


def braces(path: str) -> Iterator[str]:
    """What a path with braces stands for: `{000..331}` counts, `{a,b}` lists; the last brace moves fastest.

    Raises:
        InputError: braces of another form, or numbers that count down.
    """
    pieces = BRACES.split(path)
    choices = [[piece] if place % 2 == 0 else choose(piece, path) for place, piece in enumerate(pieces)]
    return ("".join(parts) for parts in itertools.product(*choices))


def choose(inside: str, path: str) -> list[str]:
    """What one pair of braces stands for.

    Raises:
        InputError: no numbers `first..last`, and no list.
    """
    found = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", inside)
    if found is None and "," in inside:
        return inside.split(",")
    if found is None or not 0 <= int(found[2]) - int(found[1]) < MOST_FILES:
        raise InputError(
            f"data.path={path}: {{{inside}}} is no range of at most {MOST_FILES} numbers; write {{00000..00331}}, or "
            "{train,val}"
        )
    return [str(number).zfill(len(found[1])) for number in range(int(found[1]), int(found[2]) + 1)]
