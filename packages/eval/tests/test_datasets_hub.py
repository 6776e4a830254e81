"""Hub data sets, which `datasets` loads from local files just as from the hub."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from vitreg_core.errors import InputError
from vitreg_eval.datasets.hub import open_hub
from vitreg_eval.datasets.labelled import open_labelled, open_splits

CLASSES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", 1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, splits: dict[str, list[int]], label: str = "label", image: str = "image") -> str:
    """A data set of parquet files; an image and its class from each number. Gives its name."""
    folder.mkdir()
    features = {
        image: datasets.Image(),
        label: datasets.ClassLabel(names=CLASSES),
        "coarse_label": datasets.Value("int64"),
    }
    for split, numbers in splits.items():
        rows = {
            image: [{"bytes": png(number), "path": f"{number}.png"} for number in numbers],
            label: [-1 if number < 0 else number % 3 for number in map(int, numbers)],
            "coarse_label": [0] * len(numbers),
        }
        table = datasets.Dataset.from_dict(rows, datasets.Features(features))
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return f"hub:{folder}"


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label"), ("photo", "breed")])
def test_splits_labels_and_images(image: str, label: str, tmp_path: Path) -> None:
    name = write(tmp_path / "pets", {"train": [0, 1, 2, 3], "test": [8, 4]}, label, image)
    train, val, notes = open_splits(name, None)
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1, 2, 0], [2, 1])
    assert (train.classes, notes) == (tuple(CLASSES), [])
    assert (val.data.name, val.data.split, val.data.n) == (name, "test", 2)
    assert val.read(0).tobytes() == picture(8).tobytes()
    assert val.names[1] == f"{name} test row 1"


def test_validation_before_test_unless_given(tmp_path: Path) -> None:
    name = write(tmp_path / "pets", {"train": [0, 1], "validation": [4], "test": [5]})
    assert open_hub(name, "val").data.split == "validation"
    assert open_hub(f"{name}@train,test", "val").labels.tolist() == [2]
    assert open_hub(f"{name}@validation,test", "train").labels.tolist() == [1]
    with pytest.raises(InputError, match=r"no split extra among train, validation, test; give @TRAIN,VAL"):
        open_hub(f"{name}@train,extra", "val")


def test_record_changes_with_the_images(tmp_path: Path) -> None:
    same = [open_hub(write(tmp_path / folder, {"train": [0, 1], "test": [4]}), "train").data.hash for folder in "ab"]
    other = [open_hub(write(tmp_path / "c", {"train": [0, 4], "test": [4]}), "train").data.hash]
    assert same[0] == same[1]
    assert same[0] != other[0]  # the class is the same, the file is not


@pytest.mark.parametrize("text", ["hub:", "hub:a/b@train", "hub:a/b@train,train", "hub:a/b@train[:9],val", "hub:a:b:c"])
def test_names_of_another_form(text: str) -> None:
    with pytest.raises(InputError, match=r"give hub:ORG/NAME\[:CONFIG\]\[@TRAIN,VAL\], with two different splits"):
        open_labelled(text, None, "train")


def test_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hub:org/nothing-of-this-name: cannot be loaded \(.+\); check") as caught:
        open_hub("hub:org/nothing-of-this-name", "train")
    assert "\n" not in str(caught.value)


def test_scripts_do_not_load(tmp_path: Path) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text("raise SystemExit('run')\n")
    with pytest.raises(InputError, match=r"scripted: cannot be loaded"):
        open_hub(f"hub:{folder}", "train")


def test_columns_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = datasets.Features({"label": datasets.ClassLabel(names=CLASSES)})
    images = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    two = datasets.Features({"image": datasets.Image(), "x": labels["label"], "y": labels["label"]})
    picture = {"bytes": png(0), "path": None}
    for rows, features, message in (
        ({"label": [0]}, labels, r"no column of images among label"),
        ({"image": [picture], "label": [0]}, images, r"no column of classes called label among image, label"),
        ({"image": [picture], "x": [0], "y": [0]}, two, r"no column of classes called label among image, x, y"),
        ({"image": [], "label": []}, images | labels, r"split train has no rows"),
        ({"image": [picture], "label": [-1]}, images | labels, r"split train has rows without a class"),
        ({"image": [picture], "label": [None]}, images | labels, r"split train has rows without a class"),
    ):
        table = datasets.Dataset.from_dict(rows, datasets.Features(features))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, table=table: datasets.DatasetDict(train=table))
        with pytest.raises(InputError, match=message):
            open_hub("hub:a/b", "train")


def test_image_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {"image": [{"bytes": b"no image", "path": None}, None], "label": [0, 1]}
    table = datasets.Dataset.from_dict(rows, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=table))
    found = open_hub("hub:a/b", "train")
    for index in range(2):
        with pytest.raises(InputError, match=rf"hub:a/b train row {index}: not a readable image"):
            found.read(index)


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"hub:a/b needs datasets; install it with: pip install"):
        open_hub("hub:a/b", "train")
