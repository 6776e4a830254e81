"""What a long search has finished, line by line, so that it goes on after a kill where it stopped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vitreg_core.errors import InputError


class Entry(NamedTuple):
    """What was found in one image."""

    number: int
    """Of the image in its set."""
    size: tuple[int, int]
    """Height and width in pixels."""
    boxes: list[list[int] | None]
    """With each setting: x0, y0, x1, y1; None where the search failed."""
    diagnostics: dict[str, int | float | bool]
    """Of the search with the first setting."""


class Journal:
    """Finished images of one search, in one file for each process. Lines are whole: what a kill cut off is dropped.

    A journal belongs to one key, which stands for model, settings and images.
    """

    def __init__(self, folder: Path, key: str, process: int = 0) -> None:
        self.folder = folder
        self.key = key
        self.path = folder / f"journal-{process}.jsonl"

    def __enter__(self) -> "Journal":
        """Open the file of this process.

        Raises:
            InputError: it belongs to another search, or cannot be written.
        """
        finished = list(self.entries())
        try:
            if self.path.exists():
                keep = self.path.read_bytes().rfind(b"\n") + 1
                with self.path.open("r+b") as file:
                    file.truncate(keep)
            self.file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); give another --out") from None
        if self.path.stat().st_size == 0:
            self.file.write(json.dumps({"key": self.key}) + "\n")
            self.file.flush()
        self.finished = {entry.number for entry in finished}
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.file.close()

    def add(self, entry: Entry) -> None:
        """Write down one image."""
        self.file.write(json.dumps(entry._asdict()) + "\n")
        self.file.flush()

    def entries(self) -> Iterator[Entry]:
        """Finished images of all processes.

        Raises:
            InputError: a journal of another search.
        """
        for path in sorted(self.folder.glob("journal-*.jsonl")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            for number, line in enumerate(line for line in lines if line.endswith("\n")):
                content = parse(path, line)
                if number == 0:
                    self.check(path, content, len(lines) - 1)
                else:
                    yield entry(path, content)

    def check(self, path: Path, head: dict[str, Any], finished: int) -> None:
        """Refuse the journal of another search."""
        if head.get("key") != self.key:
            raise InputError(
                f"{path} holds {finished} images of an unfinished search with another model, other settings or other "
                "images; finish that one, delete the file, or give another --out"
            )

    def remove(self) -> None:
        """Delete the files of all processes, when all that they hold is in the results."""
        for path in self.folder.glob("journal-*.jsonl"):
            path.unlink(missing_ok=True)


def parse(path: Path, line: str) -> dict[str, Any]:
    """Read one line."""
    try:
        content = json.loads(line)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: {line[:40]!r} is no line of a journal; delete the file, or give another --out")
    return content


def corners(box: list[Any]) -> list[int]:
    """The four numbers of a box."""
    x0, y0, x1, y1 = (int(value) for value in box)
    return [x0, y0, x1, y1]


def entry(path: Path, content: dict[str, Any]) -> Entry:
    """Check one line."""
    try:
        height, width = (int(side) for side in content["size"])
        boxes = [None if box is None else corners(box) for box in content["boxes"]]
        return Entry(int(content["number"]), (height, width), boxes, dict(content["diagnostics"]))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: a damaged line; delete the file, or give another --out") from None
