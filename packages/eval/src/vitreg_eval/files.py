"""Files of results that appear whole or not at all."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from vitreg_eval.results import make_folder, unwritable


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name in its folder, then give it its own.

    Raises:
        InputError: it cannot be written; what stood there is left as it was.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from None


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        InputError: it cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())
