"""Text files that a user wrote."""

from pathlib import Path

from vitreg_core.errors import InputError

LARGEST = 2**31
"""Bytes of a file that are read."""


def read_text(file: Path, wanted: str) -> str:
    """Content of a UTF-8 file, without a byte order mark.

    Args:
        file: of the user.
        wanted: what to give, for the message.

    Raises:
        InputError: it is missing, too large or no UTF-8.
    """
    try:
        size = file.stat().st_size
        content = "" if size > LARGEST else file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 (byte {error.start}); save it as UTF-8 text") from None
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise InputError(f"{file}: cannot be read ({reason}); give {wanted}") from None
    if size > LARGEST:
        raise InputError(f"{file}: {size} bytes are too many; give {wanted}")
    return content


def read_lines(file: Path, wanted: str) -> list[tuple[int, str]]:
    """Lines that are not empty, without blanks around them, and their numbers from 1.

    Raises:
        InputError: as `read_text`, or there are none.
    """
    rows = [(number, line.strip()) for number, line in enumerate(read_text(file, wanted).split("\n"), 1)]
    found = [(number, line) for number, line in rows if line]
    if not found:
        raise InputError(f"{file}: empty; give {wanted}")
    return found
