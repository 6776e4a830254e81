"""Any folder of pictures with depth: by lists of pairs, or by names that are alike but for `rgb` and `depth`."""

import re
from pathlib import Path

from vitreg_core.data.images import list_images
from vitreg_core.errors import InputError

from vitreg_eval.datasets.depth_files import Files, Split, by_scale, listed_pairs, pairs_of_files
from vitreg_eval.datasets.examples import Pairs

UNITS_PER_METRE = 1000.0
KINDS = re.compile(r"sync_depth|depth|rgb|colou?r|images?")
"""What tells a picture from its depth in names of files and folders."""
ALIASES = {"train": ("train", "training"), "test": ("test", "val", "validation")}


def rgbd_pairs(root: Path, split: Split, scale: float = UNITS_PER_METRE) -> Pairs:
    """Pictures with 16 bit depth, 0 where there is no reading.

    Args:
        root: folder with `train.txt` and `test.txt` (`image depth [focal]` in each line), or with folders `train` and
            `test` (or `val`) of files such as `rgb_1.jpg` and `depth_1.png`, or `rgb/1.jpg` and `depth/1.png`.
        split: `train` or `test`.
        scale: units of the depth files per metre.

    Raises:
        InputError: neither is there, or a picture has no depth.
    """
    listing = root / f"{split}.txt"
    files = listed_pairs(root, listing) if listing.is_file() else pairs_by_name(split_folder(root, split))
    return pairs_of_files(files, root, name=root.resolve().name, split=split, decode=by_scale(scale))


def split_folder(root: Path, split: Split) -> Path:
    """The folder of a split.

    Raises:
        InputError: there is none.
    """
    for name in ALIASES[split]:
        if (root / name).is_dir():
            return root / name
    raise InputError(f"{root}: no {split}.txt and no folder {' or '.join(ALIASES[split])} in it; give one of them")


def pairs_by_name(folder: Path) -> list[Files]:
    """Pictures below a folder with the depth whose name is alike.

    Raises:
        InputError: no pictures, or one without its other half.
    """
    paths = list_images(folder)
    depths = {key(path, folder): path for path in paths if "depth" in kind(path, folder)}
    images = {key(path, folder): path for path in paths if "depth" not in kind(path, folder)}
    for alone in images.keys() ^ depths.keys():
        path = images.get(alone) or depths[alone]
        other = "picture" if alone in depths else "depth, such as depth_1.png for rgb_1.jpg"
        raise InputError(f"{path}: no {other} with a name like it; add it, or list the pairs in train.txt and test.txt")
    return [Files(images[name], depths[name]) for name in sorted(images)]


def kind(path: Path, folder: Path) -> str:
    """Name of a file from a folder on, without its ending."""
    return str(path.relative_to(folder).with_suffix("")).lower()


def key(path: Path, folder: Path) -> str:
    """What a picture and its depth have in common."""
    return KINDS.sub("", kind(path, folder))
