"""Class folders, ImageNet-1k and Imagenette."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image
from vitreg_core.errors import InputError
from vitreg_eval.datasets.examples import subset
from vitreg_eval.datasets.imagenet import TEN
from vitreg_eval.datasets.labelled import open_labelled, open_splits

WNIDS = ["n01440764", "n01443537"]


def paint(path: Path, seed: object) -> None:
    """A picture of its own: every pixel drawn from its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(list(str(seed).encode())).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")  # the content decides, not the suffix


def class_tree(root: Path, splits: dict[str, Sequence[str]], count: int = 2) -> Path:
    for split, classes in splits.items():
        for name in classes:
            for number in range(count):
                paint(root / split / name / f"{number}.jpg", (split, name, number))
    return root


def test_flat_imagenet_val_with_the_list_of_kaggle(tmp_path: Path) -> None:
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    class_tree(root, {"train": ["n01440764", "n01443537"]})
    for number in (1, 2, 3):
        paint(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    with pytest.raises(InputError, match=r"without class folders, and no LOC_val_solution.csv"):
        open_labelled("imagenet-1k", root, "val")
    rows = "ILSVRC2012_val_00000003,n01440764 1 2 3 4 \nILSVRC2012_val_00000001,n01443537 1 2 3 4 n01443537 5 6 7 8 \n"
    solution = tmp_path / "LOC_val_solution.csv"
    solution.write_text(f"ImageId,PredictionString\n{rows}ILSVRC2012_val_00000002,n01440764 1 2 3 4\n")
    found = open_labelled("imagenet-1k", root, "val")
    assert found.names == [f"val/ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3)]
    assert found.labels.tolist() == [1, 0, 0]
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000002,n99999999 1 2 3 4\n"
    )
    with pytest.raises(InputError, match=r"no class is called 'n99999999'"):
        open_labelled("imagenet-1k", root, "val")


@pytest.mark.parametrize("large", ["before", "later"])
def test_imagenet_beside_imagenette(large: str, tmp_path: Path) -> None:
    class_tree(tmp_path / "imagenette2-320", {"train": sorted(TEN), "val": sorted(TEN)}, 1)
    class_tree(tmp_path / large, {"train": WNIDS, "val": WNIDS})
    assert len(open_labelled("imagenet-1k", tmp_path, "val").classes) == 2
    assert len(open_labelled("imagenette", tmp_path, "val").classes) == 10


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "eval", "evaluation", "test"])
def test_names_of_class_folders(train: str, val: str, tmp_path: Path) -> None:
    root = class_tree(tmp_path / "pictures", {train: ["ant", "bee"], val: ["ant", "bee"]})
    found, judged, notes = open_splits(None, root)
    assert (found.classes, found.labels.tolist()) == (("ant", "bee"), [0, 0, 1, 1])
    assert found.names[0] == f"{train}/ant/0.jpg"
    assert judged.names[-1] == f"{val}/bee/1.jpg"
    assert (found.data.name, notes) == ("pictures", [])


def test_named_set_as_class_folders_is_reported_on_its_test_folder(tmp_path: Path) -> None:
    class_tree(tmp_path / "dtd", {split: ["banded", "woven"] for split in ("train", "val", "test")})
    for place in (tmp_path, tmp_path / "dtd"):
        val = open_labelled("dtd", place, "val")
        assert {name.partition("/")[0] for name in val.names} == {"test"}
        assert (val.data.name, val.data.split) == ("dtd (class folders)", "test")
    assert open_labelled(None, tmp_path / "dtd", "val").names[0].startswith("val/")


def test_record_changes_with_names_sizes_and_labels(tmp_path: Path) -> None:
    root = class_tree(tmp_path, {"train": ["ant", "bee"]})
    first = open_labelled(None, root, "train").data
    assert open_labelled(None, root, "train").data == first
    path = root / "train" / "ant" / "0.jpg"
    path.write_bytes(path.read_bytes() + b"0")
    grown = open_labelled(None, root, "train").data
    path.rename(path.with_name("2.jpg"))
    renamed = open_labelled(None, root, "train").data
    assert len({first.hash, grown.hash, renamed.hash}) == 3


def test_subset_keeps_the_folder(tmp_path: Path) -> None:
    found = open_labelled(None, class_tree(tmp_path, {"train": ["ant", "bee"]}), "train")
    some = subset(found, torch.tensor([3, 0]), found.data)
    assert some.folder == tmp_path
    assert [some.read(0).tobytes(), some.read(1).tobytes()] == [found.read(3).tobytes(), found.read(0).tobytes()]


def test_class_folder_that_is_no_wnid(tmp_path: Path) -> None:
    root = class_tree(tmp_path, {"train": WNIDS, "val": WNIDS})
    paint(root / "train" / "tench" / "0.jpg", 0)
    with pytest.raises(InputError, match=r"class folder 'tench' is no wnid"):
        open_labelled("imagenet-1k", root, "train")


def test_image_that_is_none(tmp_path: Path) -> None:
    root = class_tree(tmp_path, {"train": ["ant"]})
    (root / "train" / "ant" / "1.jpg").write_text("no image")
    found = open_labelled(None, root, "train")
    found.read(0)
    with pytest.raises(InputError, match=r"1.jpg: not a readable image"):
        found.read(1)


@pytest.mark.real_data
def test_imagenette_of_the_sample_data(shared_data: Path) -> None:
    train, val, notes = open_splits("imagenette", shared_data / "imagenette-224")
    plain, judged, silence = open_splits(None, shared_data / "imagenette-224")
    assert (len(train), len(val), train.classes) == (1100, 400, tuple(sorted(TEN)))
    assert torch.equal(plain.labels, train.labels)
    assert torch.equal(judged.labels, val.labels)
    assert (len(notes), silence) == (2, [])
    oracle = tv.ImageFolder(shared_data / "imagenette-224" / "val")
    assert val.labels.tolist() == oracle.targets
    assert val.read(7).tobytes() == oracle[7][0].tobytes()
