"""KITTI with the Eigen split: street scenes with depth from a laser, sparse, up to 80 m."""

from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.datasets.depth_files import Files, Split, below, by_scale, first_place, listed_pairs, pairs_of_files
from vitreg_eval.datasets.examples import Pairs

LISTS = ("kitti_eigen_{}.txt", "eigen_{}_files_with_gt.txt", "{}.txt")
LEVELS = ("", "kitti", "KITTI")
IMAGES = ("", "input", "raw", "raw_data")
DEPTHS = ("", "gt_depth", "train", "val", "data_depth_annotated/train", "data_depth_annotated/val")
UNITS_PER_METRE = 256.0
HEIGHT, WIDTH = 352, 1216


def kitti_pairs(root: Path, split: Split, scale: float = UNITS_PER_METRE) -> Pairs:
    """Pictures and depth, cut to 1216x352 at the middle of the lower edge, as the KITTI benchmark does.

    Args:
        root: folder with the lists `image depth focal` and, below it, the raw data and the annotated depth.
        split: `train` or `test` of Eigen et al. 2014; pairs without depth are left out (652 of 697 remain in test).
        scale: units of the depth files per metre.

    Raises:
        InputError: no list there, or it lists files that are missing.
    """
    lists = [root / level / name.format(split) for level in LEVELS for name in LISTS]
    listing = first_place(lists, f"list of the KITTI Eigen {split} split")
    files = listed_pairs(listing.parent, listing, partial(find, listing.parent))
    return pairs_of_files(
        files, listing.parent, name="kitti", split=split, decode=by_scale(scale), prepare=benchmark_crop
    )


def find(root: Path, image: str, depth: str) -> Files:
    """Files of a line of the list, in one of the usual folders."""
    images, depths = (
        [below(root / place, name) for place in places] for name, places in ((image, IMAGES), (depth, DEPTHS))
    )
    return Files(first_place(images, f"picture {image}"), first_place(depths, f"depth {depth}"))


def benchmark_crop(image: Image.Image, depth: Tensor) -> tuple[Image.Image, Tensor]:
    """The middle of the lower edge, 1216x352."""
    top, left = image.height - HEIGHT, (image.width - WIDTH) // 2
    if min(top, left) < 0:
        raise InputError(
            f"KITTI picture of {image.width}x{image.height}, at least {WIDTH}x{HEIGHT} expected; fetch it again"
        )
    box = (left, top, left + WIDTH, top + HEIGHT)
    return image.crop(box), depth[top : top + HEIGHT, left : left + WIDTH]
