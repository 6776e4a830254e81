"""Found boxes in the forms that others read: our JSON, COCO's results, and the pickle of LOST.

The pickle is only written, never read: loading one runs code.
"""

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitreg_eval.discovery import Box
from vitreg_eval.files import write_whole
from vitreg_eval.results import write_json

FILES = ("boxes.json", "boxes_coco.json", "preds.pkl")


@dataclass(frozen=True)
class FoundBox:
    """One image's box, as it is written."""

    name: str
    """The key of LOST's prediction files: the file name in VOC, the number in COCO."""
    image_id: int
    """What COCO-style results call the image."""
    box: Box
    """x0, y0, x1, y1 in half-open pixels."""
    correct: bool | None
    """Whether it meets a true box; None where there are none."""
    diagnostics: dict[str, int | float | bool]


def write_boxes(folder: Path, found: Sequence[FoundBox]) -> None:
    """Write all three files, each whole or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    write_json(folder / "boxes.json", [record(one) for one in found])
    write_json(folder / "boxes_coco.json", [coco_record(one) for one in found])
    write_whole(folder / "preds.pkl", pickled({one.name: one.box for one in found}))


class Pickler(pickle.Pickler):
    """Pickles arrays so that every NumPy reads them: versions 1 and 2 keep their own readers in other places."""

    def reducer_override(self, given: object) -> Any:  # noqa: ANN401 (as Python defines it)
        """Store an array as a call of `numpy.array`."""
        return (np.array, (given.tolist(), given.dtype.str)) if isinstance(given, np.ndarray) else NotImplemented


def pickled(boxes: Mapping[str, Box]) -> bytes:
    """LOST's prediction file: by image name, an int64 array of x0, y0, x1, y1."""
    buffer = io.BytesIO()
    Pickler(buffer, protocol=4).dump({name: np.array(box, dtype=np.int64) for name, box in boxes.items()})
    return buffer.getvalue()


def record(one: FoundBox) -> dict[str, object]:
    """One image for boxes.json."""
    return {"image": one.name, "box": list(one.box), "correct": one.correct, **one.diagnostics}


def coco_record(one: FoundBox) -> dict[str, object]:
    """One image in the form of COCO's results; the file name stands beside what COCO defines."""
    x0, y0, x1, y1 = one.box
    return {
        "image_id": one.image_id,
        "category_id": 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "score": 1.0,
        "file_name": one.name,
    }
