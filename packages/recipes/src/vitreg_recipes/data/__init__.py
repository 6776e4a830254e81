"""Batches to train on. A batch depends on the seed and the step alone, so a run continues exactly where it stopped."""

import glob
from pathlib import Path

from vitreg_core.data.images import class_folders
from vitreg_core.errors import InputError

from vitreg_recipes.config import SCENES, TrainConfig
from vitreg_recipes.data.batch import Batch as Batch
from vitreg_recipes.data.batch import Data as Data
from vitreg_recipes.data.batch import Share as Share
from vitreg_recipes.data.folder import FolderPhotos
from vitreg_recipes.data.photos import PhotoData, Photos
from vitreg_recipes.data.scenes import SceneData
from vitreg_recipes.data.tables import hub_photos, parquet_photos
from vitreg_recipes.data.tars import TarPhotos

HUB = "hub:"


def open_data(config: TrainConfig) -> Data:
    """Find the data of a run.

    Raises:
        InputError: there is nothing at its path, no image, no label, or a single class.
    """
    if config.data.path == SCENES:
        return SceneData(config)
    return PhotoData(config, open_photos(config.data.path))


def open_photos(path: str) -> Photos:
    """Find labelled pictures: a data set of the hub, shards, or a folder.

    Raises:
        InputError: there is nothing, no image, or no label.
    """
    if path.startswith(HUB):
        return hub_photos(path.removeprefix(HUB))
    if Path(path).is_dir():
        return folder_photos(Path(path))
    if path.endswith(".tar"):
        return TarPhotos(path, matching(path), labelled=True)
    if path.endswith(".parquet"):
        return parquet_photos(path, matching(path))
    raise InputError(
        f"data.path={path}: no such folder; give {SCENES}, a folder with one sub-folder of images per class, "
        "hub:org/name, or shards such as 'shards/*.tar' or 'shards/*.parquet', in quotes"
    )


def matching(pattern: str) -> list[Path]:
    """Files of a pattern, sorted.

    Raises:
        InputError: there is none.
    """
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob refuses absolute patterns)
    files = [Path(pattern)] if Path(pattern).is_file() else sorted(filter(Path.is_file, map(Path, found)))
    if not files:
        raise InputError(f"data.path={pattern}: 0 files found; in a pattern, * stands for any letters and ? for one")
    return files


def folder_photos(folder: Path) -> Photos:
    """Pictures of a folder, or of its `train`: one sub-folder, or else one tar, per class.

    Raises:
        InputError: neither, both, or no images in one.
    """
    folder = folder / "train" if (folder / "train").is_dir() else folder
    folders, tars = class_folders(folder), sorted(folder.glob("*.tar"))
    if folders and tars:
        raise InputError(
            f"{folder}: {len(folders)} sub-folders and {len(tars)} tars found; classes are one or the other, "
            "move the rest away"
        )
    return TarPhotos(str(folder), tars, labelled=False) if tars else FolderPhotos(folder)
