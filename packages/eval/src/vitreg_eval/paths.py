"""Where a user's data is."""

import os
from pathlib import Path

from vitreg_core.errors import InputError


def data_folder(given: Path | None) -> Path:
    """The folder of --data, else of $VITREG_DATA.

    Raises:
        InputError: neither is given, or there is no such folder.
    """
    folder = given or (Path(os.environ["VITREG_DATA"]) if os.environ.get("VITREG_DATA") else None)
    if folder is None:
        raise InputError("no data: give --data DIR or set VITREG_DATA")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give --data an existing one")
    return folder
