"""The data sets of depth estimation by name, and what each counts."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.config import DepthOptions
from vitreg_eval.datasets import kitti, nyu, rgbd, sun_rgbd
from vitreg_eval.datasets.depth_files import Crop, DepthSet, Split, check_unit, valid
from vitreg_eval.datasets.examples import Pairs
from vitreg_eval.paths import data_folder

MAX_DEPTH = {"kitti": 80.0}
USUAL_MAX_DEPTH = 10.0

NYU_ROWS, NYU_COLS, NYU_SIZE = (45, 471), (41, 601), (480, 640)
GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
EIGEN = (0.3324324, 0.91351351, 0.0359477, 0.96405229)
"""Top, bottom, left and right of what counts of a KITTI image, as shares of its height and width."""


def open_depth(options: DepthOptions, split: Split) -> DepthSet:
    """The split that the options name.

    Raises:
        InputError: no such data, an empty split, a missing file, or depths that cannot be metres.
    """
    largest = max_depth(options)
    pairs = open_pairs(options, data_folder(options.data), split)
    cap = sun_rgbd.FARTHEST if options.dataset == "sun-rgbd" else None
    data = DepthSet(pairs, largest, counted_part(options), cap)
    check_unit(data, largest)
    return data


def max_depth(options: DepthOptions) -> float:
    """Largest depth in metres that is learned and counted."""
    return options.max_depth or MAX_DEPTH.get(options.dataset or "", USUAL_MAX_DEPTH)


def open_pairs(options: DepthOptions, root: Path, split: Split) -> Pairs:
    """Pictures and depth of a split."""
    scale = {} if options.depth_scale is None else {"scale": options.depth_scale}
    if options.dataset == "nyu":
        return nyu.nyu_pairs(root, split, **scale)
    if options.dataset == "kitti":
        return kitti.kitti_pairs(root, split, **scale)
    if options.dataset == "rgbd":
        return rgbd.rgbd_pairs(root, split, **scale)
    return sun_rgbd.sun_rgbd_pairs(root, **scale)


def counted_part(options: DepthOptions) -> Crop:
    """Which part of its images a data set counts."""
    if options.dataset == "kitti":
        return options.crop
    return {"nyu": "nyu", "sun-rgbd": "sun"}.get(options.dataset or "", "none")  # type: ignore[return-value]


def crop_of(crop: Crop, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns that count.

    `nyu` is Eigen's part of images of 480x640, in proportion for others; `sun` the same rows and columns of images of
    any size, as the toolbox that DINOv2 used has it.
    """
    if crop == "none":
        return slice(0, height), slice(0, width)
    if crop == "sun":
        return slice(*NYU_ROWS), slice(*NYU_COLS)
    if crop == "nyu":
        rows, cols = (
            slice(*(round(end * side / full) for end in ends))
            for ends, side, full in ((NYU_ROWS, height, NYU_SIZE[0]), (NYU_COLS, width, NYU_SIZE[1]))
        )
        return rows, cols
    top, bottom, left, right = GARG if crop == "garg" else EIGEN
    return slice(int(top * height), int(bottom * height)), slice(int(left * width), int(right * width))


def check_apart(train: Pairs, test: Pairs) -> None:
    """Refuse splits that share a picture."""
    shared = sorted(set(train.names) & set(test.names)) if train.data.name == test.data.name else []
    if shared:
        raise InputError(f"{shared[0]} is in the training and the test split, as {len(shared)} in all; list them once")


def mean_depth(data: DepthSet, most: int = 64) -> float:
    """Mean reading of some pictures of a set, in metres: the best guess without looking."""
    count = min(len(data.pairs), most)
    maps = (data.pairs.read(index * len(data.pairs) // count)[1] for index in range(count))
    readings = torch.cat([counted(depth, data.max_depth) for depth in maps])
    return readings.mean(dtype=torch.float64).item()


def counted(depth: Float[Tensor, "height width"], largest: float) -> Float[Tensor, " n"]:
    """Readings of a picture that are not too far."""
    readings = valid(depth)
    return readings[readings <= largest]
