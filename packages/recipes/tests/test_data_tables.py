import io
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data import Share, open_data, open_photos

Tiny = Callable[..., TrainConfig]
CPU = torch.device("cpu")
ALONE = Share(size=4, process=0, processes=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", 1)
    datasets.disable_progress_bars()


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def rows(numbers: range, **columns: object) -> dict[str, object]:
    return {"image": [{"bytes": picture(n), "path": f"{n}.png"} for n in numbers], **columns}


def write_parquet(folder: Path) -> str:
    """Two files of 9 and 5 rows, in groups of 4, with three named classes."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cow"])})
    for name, numbers in (("part-0", range(9)), ("part-1", range(9, 14))):
        table = datasets.Dataset.from_dict(rows(numbers, label=[n % 3 for n in numbers]), features)
        table.to_parquet(str(folder / f"{name}.parquet"), batch_size=4)
    return str(folder / "part-*.parquet")


def hub(monkeypatch: pytest.MonkeyPatch, table: datasets.Dataset) -> None:
    """Put a table in the place of a data set of the hub."""

    def load(name: str, *, data_files: None, split: str) -> datasets.Dataset:
        assert (name, split) == ("org/pets", "train")
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)


def images(config: TrainConfig, count: int, *, step: int = 0, share: Share = ALONE) -> Tensor:
    return torch.cat([batch.images for batch in islice(open_data(config).batches(step, share, CPU), count)])


def test_parquet_is_read_row_by_row(tmp_path: Path) -> None:
    photos = open_photos(write_parquet(tmp_path))
    assert (photos.classes, photos.labels.tolist()) == (["ant", "bee", "cow"], [n % 3 for n in range(14)])
    for number in range(14):
        with Image.open(io.BytesIO(picture(number))) as image:
            assert photos.read(number).tobytes() == image.tobytes()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_parquet_resumes_at_any_step_with_any_workers(tiny: Tiny, tmp_path: Path, workers: int) -> None:
    path = write_parquet(tmp_path)
    whole = images(tiny(data__path=path), 9)
    assert torch.equal(images(tiny(data__path=path, data__workers=workers), 4, step=5), whole[20:])
    shares = [images(tiny(data__path=path), 1, step=2, share=Share(7, process, 2)) for process in range(2)]
    assert len(torch.cat(shares).flatten(1).unique(dim=0)) == 14


def test_a_folder_through_the_hub_gives_the_same_batches(
    tiny: Tiny, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, datasets.load_dataset("imagefolder", data_dir=str(photos), split="train"))
    data = open_data(tiny(data__path="hub:org/pets"))
    assert (data.classes, data.images) == (["cat", "dog"], 7)
    assert torch.equal(images(tiny(data__path="hub:org/pets"), 3), images(tiny(data__path=str(photos)), 3))


def test_a_table_on_the_disk_with_labels_that_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"jpg": [picture(n) for n in range(4)], "cls": ["dog", "cat", "dog", "cat"], "height": [1, 2, 3, 4]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "table"))
    hub(monkeypatch, datasets.load_from_disk(str(tmp_path / "table")))
    photos = open_photos("hub:org/pets")
    assert (photos.classes, photos.labels.tolist()) == (["cat", "dog"], [1, 0, 1, 0])
    assert photos.read(3).size == (24, 20)


def test_a_broken_image_in_a_table_is_replaced_and_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    values = rows(range(6), label=[0, 1] * 3)
    values["image"][2] = {"bytes": b"broken", "path": "broken.jpg"}  # type: ignore[index]
    values["image"][4] = None  # type: ignore[index]
    hub(monkeypatch, datasets.Dataset.from_dict(values).cast_column("image", datasets.Image()))
    data = open_data(tiny(data__path="hub:org/pets"))
    list(islice(data.batches(0, ALONE, CPU), 4))
    assert data.skipped == {"hub:org/pets row 2 (broken.jpg)", "hub:org/pets row 4"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0, 1, 0]}, "no column of images among label; name it image"),
        ({"image": 3, "text": ["a", "b", "c"]}, "no column named label among image, text; name one so"),
        ({"image": 3, "label": [0, -1, 1]}, "rows without a label; give a split with labels"),
        ({"image": 3, "label": [0, None, 1]}, "rows without a label"),
        ({"image": 3, "label": ["a", None, "b"]}, "rows without a label"),
        ({"image": 0, "label": []}, "0 rows found; give data with images"),
    ],
)
def test_tables_that_cannot_be_used_are_named(
    monkeypatch: pytest.MonkeyPatch, columns: dict[str, object], message: str
) -> None:
    if "image" in columns:
        columns = rows(range(columns["image"]), **{n: c for n, c in columns.items() if n != "image"})  # type: ignore[call-overload]
    hub(monkeypatch, datasets.Dataset.from_dict(columns))
    with pytest.raises(InputError, match=f"data.path=hub:org/pets: {message}"):
        open_photos("hub:org/pets")


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(InputError, match=r"text.parquet: cannot be loaded \(.+\); check its name and form") as error:
        open_photos(str(tmp_path / "text.parquet"))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"data.path=hub:org/none: cannot be loaded \(.*org/none"):
        open_photos("hub:org/none")


def test_without_datasets_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"hub:org/pets needs datasets; .*: pip install 'vitreg-recipes\[datasets\]'"):
        open_photos("hub:org/pets")
