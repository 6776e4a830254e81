"""Files that appear whole or not at all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name beside it, then give it its own.

    Raises:
        OSError: it cannot be written; what stood there is left as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write values as JSON, as `write_text` does.

    Raises:
        OSError: it cannot be written; what stood there is left as it was.
    """
    write_text(path, json.dumps(values, indent=2) + "\n")
