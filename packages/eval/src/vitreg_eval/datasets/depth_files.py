"""What the data sets with depth share: lists of pairs, 16 bit pictures of depth, and a look at their unit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from vitreg_core.data.images import read_image
from vitreg_core.errors import InputError

from vitreg_eval.datasets import sha256
from vitreg_eval.datasets.examples import Pairs
from vitreg_eval.results import DataRecord

LOOKED_AT = 8
"""Pictures of depth whose unit is looked at before anything is computed."""
NEAREST = 0.05
"""Metres; a set whose median depth is below is in another unit."""
FAR, FAR_SHARE = 0.99, 0.1
"""A set is also in another unit where this share of its readings is nearer than that share of the largest depth:
centimetres read as millimetres."""
MOST = 2**16 - 1
"""Largest number in a picture of depth."""

Crop = Literal["nyu", "sun", "garg", "eigen", "none"]
Decode = Callable[[np.ndarray], np.ndarray]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class DepthSet:
    """Pictures with depth, and how they are evaluated."""

    pairs: Pairs
    max_depth: float
    """Metres; pixels whose true depth is not below do not count."""
    crop: Crop
    """Which part of an image counts."""
    cap: float | None = None
    """Metres to which predictions are cut, as true depths were, before they are compared."""


class Files(NamedTuple):
    """A picture and its depth."""

    image: Path
    depth: Path


def listed_pairs(root: Path, listing: Path, find: Callable[[str, str], Files] | None = None) -> list[Files]:
    """The pairs that a list names: picture and depth in the first two columns, below a folder.

    Args:
        root: folder that holds both; a slash in front of a name is ignored.
        listing: one pair in each line; a third column (the focal length) is not used; pairs whose depth is `None` are
            left out.
        find: from the two names to files, where they are not below `root` itself.

    Raises:
        InputError: the list is missing or empty, or names a file that is missing or outside the folder.
    """
    find = find or (lambda image, depth: Files(below(root, image), below(root, depth)))
    found = []
    for number, line in enumerate(read_lines(listing), start=1):
        words = line.split()
        if not words or (len(words) > 1 and words[1] == "None"):
            continue
        if len(words) < 2:
            raise InputError(f"{listing}: line {number} is {line[:80]!r}; write 'image depth [focal]' in each line")
        found.append(find(words[0], words[1]))
    if not found:
        raise InputError(f"{listing}: 0 pairs listed; write 'image depth [focal]' in each line")
    return found


def read_lines(path: Path) -> list[str]:
    """Lines of a text file.

    Raises:
        InputError: it is missing or not text.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); put the list of the split there") from None
    except ValueError:
        raise InputError(f"{path}: not a text file; put the list of the split there") from None


def below(root: Path, name: str) -> Path:
    """A listed file below a folder.

    Raises:
        InputError: the name leads out of the folder.
    """
    relative = PurePosixPath(name.lstrip("/\\"))
    if ".." in relative.parts:
        raise InputError(f"{name!r} leads out of {root}; list files below it")
    return root / relative


def first_place(places: Sequence[Path], what: str) -> Path:
    """The first of several places that there is.

    Raises:
        InputError: none of them.
    """
    for place in places:
        if place.exists():
            return place
    raise InputError(f"{what} not found; looked for {', '.join(map(str, places))}")


def pairs_of_files(
    files: Sequence[Files],
    root: Path,
    *,
    name: str,
    split: str,
    decode: Decode,
    prepare: Callable[[Image.Image, Tensor], tuple[Image.Image, Tensor]] | None = None,
) -> Pairs:
    """Pairs that are read one by one.

    Args:
        files: pictures and depths.
        root: folder that names in messages are relative to.
        name: of the data set.
        split: of it.
        decode: from the 16 bit numbers of a file to metres.
        prepare: what the data set does to every pair, such as a crop.

    Raises:
        InputError: a file is missing; while reading, one that is damaged or does not fit.
    """
    names = ["/".join(pair.image.relative_to(root).parts) for pair in files]
    sizes = [f"{name} {size(pair.image)} {size(pair.depth)}" for name, pair in zip(names, files, strict=True)]

    def read(index: int) -> tuple[Image.Image, Tensor]:
        image, depth = read_image(files[index].image), read_depth(files[index].depth, decode)
        check_size(files[index], image, depth)
        return prepare(image, depth) if prepare else (image, depth)

    record = DataRecord(name=name, split=split, n=len(files), hash=sha256("\n".join(sizes)))
    return Pairs(record, read, names)


def size(path: Path) -> int:
    """Bytes of a file.

    Raises:
        InputError: there is no such file.
    """
    try:
        return path.stat().st_size
    except OSError:
        raise InputError(f"{path}: no such file, but the split lists it; complete the data, or give --data") from None


def read_depth(path: Path, decode: Decode) -> Float[Tensor, "height width"]:
    """Depth in metres of a 16 bit picture of one channel; 0 where there is no reading.

    Raises:
        InputError: the file cannot be read, or has not 16 bits in one channel.
    """
    try:
        with Image.open(path) as image:
            mode, raw = image.mode, np.asarray(image)
    except Exception as error:  # Pillow's readers raise whatever damage makes them stumble over
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a readable picture of depth ({reason}); replace it") from None
    if mode != "I" and not mode.startswith("I;16"):
        raise InputError(
            f"{path}: depth with mode {mode}; it must be one channel of 16 bits, 0 where there is no reading"
        )
    if raw.min(initial=0) < 0 or raw.max(initial=0) > MOST:
        raise InputError(f"{path}: depths from {raw.min()} to {raw.max()}; they must be 16 bits, 0 to {MOST}")
    return torch.from_numpy(decode(raw.astype(np.uint16)).astype(np.float32))


def by_scale(scale: float) -> Decode:
    """Decoder for numbers that are metres times a scale."""
    return partial(metres, scale)


def metres(scale: float, raw: np.ndarray) -> np.ndarray:
    """Metres of stored numbers."""
    return raw.astype(np.float32) / np.float32(scale)


def check_size(files: Files, image: Image.Image, depth: Float[Tensor, "height width"]) -> None:
    """Refuse a depth that does not lie over its picture."""
    if tuple(depth.shape) != (image.height, image.width):
        theirs = f"{depth.shape[1]}x{depth.shape[0]}"
        raise InputError(f"{files.depth}: depth of {theirs} for a picture of {image.width}x{image.height}; align them")


def check_unit(data: DepthSet, largest: float) -> None:
    """Refuse a set whose depths cannot be metres, by the median reading of some of its pictures.

    Raises:
        InputError: no readings, a median that is nearer than 5 cm or beyond `largest` metres, or 99 % of the readings
            within a tenth of it.
    """
    pairs = data.pairs
    count = min(LOOKED_AT, len(pairs))
    readings = torch.cat([valid(pairs.read(index * len(pairs) // count)[1]) for index in range(count)])
    where = f"{pairs.data.name} {pairs.data.split}"
    if not len(readings):
        raise InputError(
            f"{where}: {count} pictures of depth have no reading at all; check the files of {pairs.names[0]}"
        )
    median, far = readings.median().item(), np.quantile(readings.numpy(), FAR).item()
    advice = "give the units per metre of the files as --depth_scale, or another --max_depth"
    if median < NEAREST or median > largest:
        raise InputError(f"{where}: median depth {median:.4g} m, expected {NEAREST} to {largest:g} m; {advice}")
    if far < FAR_SHARE * largest:
        raise InputError(f"{where}: {FAR:.0%} of the depths are below {far:.4g} m, of up to {largest:g} m; {advice}")


def valid(depth: Float[Tensor, "height width"]) -> Float[Tensor, " n"]:
    """The readings of a picture."""
    return depth[depth > 0]
