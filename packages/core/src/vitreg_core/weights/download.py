"""Files from the network: fetched whole or not at all, kept in a cache, and checked before every use."""

import hashlib
import http.client
import os
import re
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from vitreg_core.errors import InputError
from vitreg_core.whole import write_text

CHUNK = 1 << 20
NAMED_HASH = re.compile(r"-([0-9a-f]{8,64})\.")
TIMEOUT = 60
"""Seconds without an answer after which a server counts as out of reach."""


def cache_folder() -> Path:
    """Where downloads are kept: $VITREG_CACHE, or ~/.cache/vitreg."""
    return Path(os.environ.get("VITREG_CACHE") or Path.home() / ".cache" / "vitreg")


def download(url: str, folder: Path) -> Path:
    """The file behind an address, from the folder or else from the network, with progress on stderr.

    The length is compared with what the server announced, and the SHA-256 with the one in the file name where there is
    one (`name-0123abcd.pth`). It is written beside the file, and compared again at every later call.

    Raises:
        InputError: the file cannot be fetched (says where to put it), was cut short, or is not what it was.
    """
    file = folder / url.rpartition("/")[2]
    if file.is_file():
        check_hash(file)
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            part = Path(temporary, file.name)
            fetch(url, part)
            found = sha256(part)
            check_name(file.name, found, f"{url}: nothing was kept, try again")
            write_text(record(file), found + "\n")
            part.replace(file)
    except (OSError, http.client.HTTPException) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise InputError(f"cannot fetch {url} ({reason}); get that file another way and put it at {file}") from None
    return file


def fetch(url: str, file: Path) -> None:
    """Write what the server sends, and refuse less than it announced."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, file.open("wb") as out:  # noqa: S310 (fixed addresses)
        expected = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=expected or None, unit="B", unit_scale=True, desc=file.name, disable=None) as bar:
            while chunk := answer.read(CHUNK):
                bar.update(out.write(chunk))
        if expected and out.tell() != expected:
            raise InputError(f"{url}: {out.tell()} of {expected} bytes came; nothing was kept, try again")


def check_hash(file: Path) -> None:
    """Compare a file with the hash in its name, and with the one written when it was fetched."""
    known = record(file).read_text().strip() if record(file).is_file() else ""
    if not known and not NAMED_HASH.search(file.name):
        return
    found = sha256(file)
    check_name(file.name, found, f"{file}: remove it and fetch it again")
    if known and found != known:
        raise InputError(f"{file}: remove it and fetch it again; it changed since then: SHA-256 {found}, not {known}")


def check_name(name: str, found: str, advice: str) -> None:
    """Compare the hash of a file with the one in its name."""
    named = NAMED_HASH.search(name)
    if named and not found.startswith(named[1]):
        raise InputError(f"{advice}; its SHA-256 {found} does not begin with {named[1]}")


def record(file: Path) -> Path:
    """Where the hash of a file is written."""
    return file.with_name(f"{file.name}.sha256")


def sha256(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
