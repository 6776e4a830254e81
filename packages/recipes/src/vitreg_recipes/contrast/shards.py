"""Images and captions inside tar shards: key.jpg beside key.txt or key.json, keys ending at the first dot (webdataset).

As for labelled shards, the places of all are found once and kept in the cache, and any sample is read by its place: so
there may be fewer shards than workers, order and resuming know nothing of shards, and no buffer shuffles.
"""

import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image
from tqdm import tqdm
from vitreg_core.data.images import SUFFIXES, decode_image

from vitreg_recipes.contrast.tables import TEXT_NAMES
from vitreg_recipes.data.tars import cached, member_name, members, read_bytes, split_key


class Places(NamedTuple):
    """Where images and captions lie."""

    shards: Int[np.ndarray, " n"]
    """Which tar holds each pair."""
    images: Int[np.ndarray, "n 2"]
    """First byte and number of bytes of each image."""
    texts: Int[np.ndarray, "n 2"]
    """First byte and number of bytes of each caption's file."""
    in_json: Bool[np.ndarray, " n"]
    """Whether that file is a key.json."""
    dropped: Int[np.ndarray, ""]
    """Samples without image or caption."""


class ShardCaptions:
    """Images inside tar files, with their captions.

    Raises:
        InputError: a tar is damaged.
    """

    def __init__(self, where: str, shards: list[Path], text: str | None) -> None:
        self.where = where
        self.shards = shards
        self.text = text
        self.places = cached(Places, shards, ["captions", text], lambda: find_places(shards, text))
        self.dropped = int(self.places.dropped)

    def __len__(self) -> int:
        return len(self.places.shards)

    def name(self, index: int) -> str:
        """Tar and member."""
        return member_name(self.shard(index), int(self.places.images[index, 0]))

    def shard(self, index: int) -> Path:
        """The tar of an image."""
        return self.shards[self.places.shards[index]]

    def read(self, index: int) -> Image.Image:
        """Read an image by its place in its tar.

        Raises:
            InputError: it cannot be read.
        """
        shard = self.shard(index)
        return decode_image(read_bytes(shard, *self.places.images[index].tolist()), str(shard))

    def caption(self, index: int) -> str:
        """Read a caption by its place in its tar.

        Raises:
            InputError: the tar cannot be read.
        """
        content = decode_text(read_bytes(self.shard(index), *self.places.texts[index].tolist()))
        return text_of(content, self.text) if self.places.in_json[index] else content


def find_places(shards: list[Path], text: str | None) -> Places:
    """Read the headers and captions of all tars."""
    rows: list[tuple[int, int, int, int, int, bool]] = []
    dropped = 0
    for number, shard in enumerate(tqdm(shards, "reading the headers of the tars", unit="tar", disable=None)):
        pairs, lost = pairs_of(shard, text)
        dropped += lost
        for image, (caption, in_json) in pairs:
            rows.append((number, image.offset_data, image.size, caption.offset_data, caption.size, in_json))
    table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    return Places(
        table[:, 0].astype(np.int32), table[:, 1:3], table[:, 3:5], table[:, 5].astype(bool), np.array(dropped)
    )


Pair = tuple[tarfile.TarInfo, tuple[tarfile.TarInfo, bool]]


def pairs_of(shard: Path, text: str | None) -> tuple[list[Pair], int]:
    """Images of a shard with their captions, in its order, and the number of samples that lack one of them.

    key.txt goes before key.json, unless `text` names an entry of the latter. Of two images of a key the first counts.
    """
    images: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, tuple[tarfile.TarInfo, bool]] = {}
    keys: set[str] = set()
    for member, content in members(shard, (".txt", ".json")):
        key, suffix = split_key(member.name)
        if suffix in SUFFIXES:
            images.setdefault(key, member)
        elif suffix == ".txt" and text is None and content:
            captions[key] = (member, False)
        elif suffix == ".json" and text_of(content, text):
            captions.setdefault(key, (member, True))
        elif suffix not in (".txt", ".json"):
            continue
        keys.add(key)
    pairs = [(image, captions[key]) for key, image in images.items() if key in captions]
    return pairs, len(keys) - len(pairs)


def decode_text(content: bytes) -> str:
    """The text of a file."""
    return content.decode(errors="replace").strip()


def text_of(content: str, name: str | None) -> str:
    """The caption in a key.json, by the name of its entry or the usual ones; empty where there is none."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(values, dict):
        return ""
    found = (values.get(entry) for entry in ((name,) if name else TEXT_NAMES))
    return next((value.strip() for value in found if isinstance(value, str) and value.strip()), "")
