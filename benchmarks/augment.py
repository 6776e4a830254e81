"""Reading and augmenting photos for training: ours against timm's data set and transform, in turn, on one core.

    python benchmarks/augment.py [--images DIR] [--size 224] [--repeats 9]

Both read the same JPEG files and apply 3-Augment; with the same random numbers the pixels are compared bit by bit.
Without `--images`, 200 JPEGs of 500 x 375 pixels are made. Speeds are images per second of CPU time, so that other
work on the machine does not count; ours include seeding every image by its place in the run.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor
from vitreg_core.config import PreprocessConfig
from vitreg_recipes.augment import seeded, training_transform
from vitreg_recipes.data.folder import FolderPhotos
from vitreg_recipes.data.photos import join
from vitreg_recipes.data.reading import Samples

MADE = 200  # photos, where none are given
ROUND = 100  # photos in a batch, between two looks at the clock


def make_photos(folder: Path) -> Path:
    """Write JPEGs with the size of a photo of ImageNet."""
    numbers = np.random.default_rng(0)
    for index in range(MADE):
        coarse = Image.fromarray(numbers.integers(0, 256, (32, 42, 3), dtype=np.uint8))
        path = folder / f"class{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def speed(read: Callable[[range], Tensor], start: int) -> float:
    """Images per second of CPU time."""
    clock = time.process_time()
    read(range(start, start + ROUND))
    return ROUND / (time.process_time() - clock)


def measure(folder: Path, size: int, repeats: int) -> None:
    """Print the speeds of both, and their ratio."""
    preprocess = PreprocessConfig(image_size=size)
    photos = FolderPhotos(folder)
    ours = training_transform("three", preprocess)
    samples = Samples(photos, lambda image, index: (ours(image), int(photos.labels[index])), join, seed=0)
    count = len(photos)
    transform = create_transform(
        size, is_training=True, auto_augment="3a", color_jitter=0.3, interpolation="bicubic", hflip=0.5
    )
    theirs = create_dataset("", str(folder), transform=transform)

    order = {Path(theirs.filename(index)).name: index for index in range(count)}  # timm sorts by the numbers in names
    same_file = [order[photos.path(index).name] for index in range(count)]

    def read_ours(places: range) -> Tensor:
        return samples.__getitems__([(place, place % count) for place in places])[0][0]

    def read_theirs(places: range) -> Tensor:
        return torch.stack([theirs[same_file[place % count]][0] for place in places])

    same = 0
    for place in range(ROUND):
        with seeded(0, place):
            same += torch.equal(read_theirs(range(place, place + 1)), read_ours(range(place, place + 1)))
    print(f"{size} px: {same} of {ROUND} images equal, bit by bit")
    speeds = [(speed(read_ours, turn * ROUND), speed(read_theirs, turn * ROUND)) for turn in range(repeats + 1)][1:]
    speed_ours, timms = (median(values) for values in zip(*speeds, strict=True))
    ratios = [one / other for one, other in speeds]
    print(f"{size} px: ours {speed_ours:.0f} images/s per core, timm {timms:.0f}")
    print(f"{size} px: ratio {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def main() -> None:
    """Compare on the given photos, or on made ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure(options.images or make_photos(Path(folder)), options.size, options.repeats)


if __name__ == "__main__":
    main()
