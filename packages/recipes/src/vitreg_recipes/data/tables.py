"""Data sets of the Hugging Face hub, and parquet files: rows of an image and a label, through `datasets`.

`datasets` lays the rows out as an Arrow file in its cache ($HF_HOME), once, and maps it into memory: rows are read from
the disk one by one, in any order.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from vitreg_core.data.images import decode_image, read_image
from vitreg_core.errors import InputError

from vitreg_recipes.data.tars import LABEL_NAMES, number_classes, refuse_wide


class TableImages:
    """Images in the rows of a `datasets.Dataset`.

    Raises:
        InputError: no column of images, or no rows.
    """

    def __init__(self, where: str, table: Any) -> None:  # noqa: ANN401 (a type of `datasets`)
        self.where = where
        self.image = image_column(where, table)
        if not len(table):
            raise InputError(f"data.path={where}: 0 rows found; give data with images")
        self.rows = table.select_columns([self.image])
        self.rows = self.rows.cast_column(self.image, require_datasets(where).Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def file(self, index: int) -> dict[str, Any]:
        """`bytes` and `path` of an image file, either of which may be None."""
        return self.rows[index][self.image] or {"bytes": b"", "path": None}

    def name(self, index: int) -> str:
        """Number of the row, from 0, and the name of its file where it has one."""
        path = self.file(index)["path"]
        return f"{self.where} row {index}" + (f" ({path})" if path else "")

    def read(self, index: int) -> Image.Image:
        """Read the image of a row.

        Raises:
            InputError: it cannot be read.
        """
        file = self.file(index)
        if file["bytes"] is None and file["path"]:
            return read_image(Path(file["path"]))
        return decode_image(file["bytes"] or b"", self.where)


class TablePhotos(TableImages):
    """Rows with labels.

    Raises:
        InputError: no column of images, no or several columns of labels, or rows without a label.
    """

    def __init__(self, where: str, table: Any) -> None:  # noqa: ANN401 (a type of `datasets`)
        super().__init__(where, table)
        label = label_column(where, table)
        self.classes, self.labels = read_labels(where, table.features[label], table.with_format("numpy")[label][:])


def hub_photos(name: str) -> TablePhotos:
    """The training images of a data set of the hub, fetched once.

    Raises:
        InputError: `datasets` is not installed, there is no such data set, or its columns do not fit.
    """
    return TablePhotos(f"hub:{name}", load(f"hub:{name}", name, None))


def parquet_photos(where: str, files: list[Path]) -> TablePhotos:
    """The rows of some parquet files.

    Raises:
        InputError: `datasets` is not installed, a file is damaged, or the columns do not fit.
    """
    return TablePhotos(where, load(where, "parquet", [str(file) for file in files]))


def load(where: str, name: str, files: list[str] | None) -> Any:  # noqa: ANN401 (a type of `datasets`)
    """Load the training rows."""
    datasets = require_datasets(where)
    try:
        return datasets.load_dataset(name, data_files=files, split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"data.path={where}: cannot be loaded ({reason}); check its name and form") from None


def require_datasets(where: str) -> ModuleType:
    """Import `datasets`."""
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise InputError(
            f"data.path={where} needs datasets; install it with: pip install 'vitreg-recipes[datasets]'"
        ) from None


def image_column(where: str, table: Any) -> str:  # noqa: ANN401 (a type of `datasets`)
    """The column of images: of that type, or bytes under a name that says so."""
    datasets = require_datasets(where)
    names = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    names = names or [name for name in ("image", "jpg", "png", "webp", "img") if name in table.features]
    if not names:
        raise InputError(f"data.path={where}: no column of images among {', '.join(table.features)}; name it image")
    return names[0]


def label_column(where: str, table: Any) -> str:  # noqa: ANN401 (a type of `datasets`)
    """The column of labels: by its name, or else the only one of that type."""
    datasets = require_datasets(where)
    names = [name for name in LABEL_NAMES if name in table.features][:1]
    names = names or [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(names) != 1:
        raise InputError(f"data.path={where}: no column named label among {', '.join(table.features)}; name one so")
    return names[0]


def read_labels(where: str, feature: Any, values: Any) -> tuple[list[str], np.ndarray]:  # noqa: ANN401 (as above)
    """Names of the classes, and the class of each row.

    Raises:
        InputError: rows without a label.
    """
    labels = np.asarray(values)
    if labels.dtype.kind in "iu" and labels.min() >= 0:
        names = getattr(feature, "names", None)
        if names is None:
            refuse_wide(labels)
        return names or [str(number) for number in range(labels.max() + 1)], labels
    if labels.dtype.kind in "UT" or (labels.dtype.kind == "O" and all(isinstance(name, str) for name in labels)):
        different, codes = np.unique(labels.astype(str), return_inverse=True)
        classes, places = number_classes(different.tolist())
        return classes, places[codes]
    raise InputError(f"data.path={where}: rows without a label; give a split with labels, as numbers or names")
