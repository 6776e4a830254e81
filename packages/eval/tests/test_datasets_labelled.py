"""Every labelled data set from a tiny copy of its official layout, read as torchvision reads it where it can."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image
from scipy.io import savemat
from vitreg_core.errors import InputError
from vitreg_eval.config.datasets import DATASETS
from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.imagenet import TEN
from vitreg_eval.datasets.labelled import LAYOUTS, count_note, open_labelled, open_splits
from vitreg_eval.results import DataRecord

Build = Callable[[Path], Path]


def paint(path: Path, seed: object) -> None:
    """A picture of its own: every pixel drawn from its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(list(str(seed).encode())).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")  # the content decides, not the suffix


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def class_tree(root: Path, splits: dict[str, Sequence[str]], count: int = 2) -> Path:
    for split, classes in splits.items():
        for name in classes:
            for number in range(count):
                paint(root / split / name / f"{number}.jpg", (split, name, number))
    return root


def aircraft(top: Path) -> Path:
    data = top / "fgvc-aircraft-2013b" / "data"
    write(data / "variants.txt", "707-320\nBoeing 717\nF/A-18\n")
    write(data / "images_variant_trainval.txt", "0034309 F/A-18\n0034310 707-320\n")
    write(data / "images_variant_test.txt", "0034311 Boeing 717\n0034312 F/A-18\n1514522 707-320\n")
    for name in ("0034309", "0034310", "0034311", "0034312", "1514522"):
        paint(data / "images" / f"{name}.jpg", name)
    return top / "fgvc-aircraft-2013b"


def cub(top: Path) -> Path:
    root = top / "CUB_200_2011"
    names = ["001.Albatross/a.jpg", "001.Albatross/b.jpg", "002.Auklet/c.jpg", "002.Auklet/d.jpg", "002.Auklet/e.jpg"]
    write(root / "classes.txt", "1 001.Albatross\n2 002.Auklet\n")
    write(root / "images.txt", "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    write(root / "image_class_labels.txt", "1 1\n2 1\n3 2\n4 2\n5 2\n")
    write(root / "train_test_split.txt", "1 0\n2 1\n3 1\n4 0\n5 0\n")
    for name in names:
        paint(root / "images" / name, name)
    return root


def caltech(top: Path) -> Path:
    root = top / "caltech101" / "101_ObjectCategories"
    for name, count in (("BACKGROUND_Google", 2), ("Faces", 33), ("accordion", 32)):
        for number in range(1, count + 1):
            paint(root / name / f"image_{number:04d}.jpg", (name, number))
    write(root / "accordion" / ".DS_Store", "stray")
    return root.parent


def cars(top: Path) -> Path:
    root = top / "stanford_cars"
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]

    def annotations(rows: list[tuple[int, str]]) -> dict[str, Any]:
        table = np.array([(1, 1, 5, 5, label, name) for label, name in rows], dtype=[(f, "O") for f in fields])
        return {"annotations": table[None]}

    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array([["AM General", "Acura RL"]], dtype=object)})
    train, test = [(2, "00001.jpg"), (1, "00002.jpg")], [(1, "00001.jpg"), (2, "00002.jpg"), (2, "00003.jpg")]
    savemat(root / "devkit" / "cars_train_annos.mat", annotations(train))
    savemat(root / "cars_test_annos_withlabels.mat", annotations(test))
    for part, rows in (("train", train), ("test", test)):
        for _, name in rows:
            paint(root / f"cars_{part}" / name, (part, name))
    return root


def dtd(top: Path) -> Path:
    root = top / "dtd" / "dtd"
    lists = {
        "train1": ["woven/woven_01.jpg", "banded/banded_01.jpg"],
        "val1": ["banded/banded_02.jpg", "woven/woven_02.jpg"],
        "test1": ["woven/woven_03.jpg", "banded/banded_03.jpg"],
    }
    for part, names in lists.items():
        write(root / "labels" / f"{part}.txt", "\n".join(names) + "\n")
        for name in names:
            paint(root / "images" / name, name)
    return root


def flowers(top: Path) -> Path:
    root = top / "flowers-102"
    root.mkdir()
    savemat(root / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 5, 5, 77, 1]], dtype=np.uint8)})
    ids = {"trnid": [[6, 4]], "valid": [[2, 7]], "tstid": [[1, 3, 5]]}
    savemat(root / "setid.mat", {key: np.array(value, dtype=np.uint16) for key, value in ids.items()})
    for number in range(1, 8):
        paint(root / "jpg" / f"image_{number:05d}.jpg", number)
    return root


def food(top: Path) -> Path:
    root = top / "food-101"
    lists = {
        "train": {"waffles": ["12"], "apple_pie": ["1005649", "7"]},
        "test": {"apple_pie": ["8"], "waffles": ["9"]},
    }
    for part, classes in lists.items():
        named = {name: [f"{name}/{number}" for number in numbers] for name, numbers in classes.items()}
        write(root / "meta" / f"{part}.json", json.dumps(named))
        write(root / "meta" / f"{part}.txt", "\n".join(name for names in named.values() for name in names) + "\n")
        for names in named.values():
            for name in names:
                paint(root / "images" / f"{name}.jpg", name)
    return root


def pets(top: Path) -> Path:
    root = top / "oxford-iiit-pet"
    lists = {
        "trainval": [("Abyssinian_100", 1), ("american_bulldog_10", 2)],
        "test": [("Abyssinian_2", 1), ("american_bulldog_203", 2), ("american_bulldog_7", 2)],
    }
    for part, rows in lists.items():
        write(root / "annotations" / f"{part}.txt", "".join(f"{name} {label} 1 1\n" for name, label in rows))
        for name, _ in rows:
            paint(root / "images" / f"{name}.jpg", name)
    return root


def sun(top: Path) -> Path:
    lists = {
        "Training_01": ["/b/bar/sun_1.jpg", "/a/apse/indoor/sun_2.jpg"],
        "Testing_01": ["/a/apse/indoor/sun_3.jpg", "/b/bar/sun_4.jpg", "/b/bar/sun_5.jpg"],
    }
    for part, names in lists.items():
        write(top / "Partitions" / f"{part}.txt", "\n".join(names) + "\n")
        for name in names:
            paint(top / "SUN397" / name.strip("/"), name)
    for folder in ("Partitions", "SUN397"):
        write(top / folder / "ClassName.txt", "/a/abbey\n/a/apse/indoor\n/b/bar\n")
    return top


def places(top: Path) -> Path:
    lists = {
        "train": [("a/abbey/gsun_1.jpg", 0), ("y/yard/gsun_2.jpg", 204)],
        "val": [("a/abbey/gsun_3.jpg", 0), ("a/abbey/gsun_4.jpg", 0), ("y/yard/gsun_5.jpg", 204)],
    }
    for part, rows in lists.items():
        path = top / "trainvalsplit_places205" / f"{part}_places205.csv"
        write(path, "".join(f"{name} {label}\n" for name, label in rows))
        for name, _ in rows:
            paint(top / "data/vision/torralba/deeplearning/images256" / name, name)
    return top


def voc(top: Path) -> Path:
    root = top / "VOCdevkit" / "VOC2007"
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox>"
    objects = {
        "000005": [("chair", 0), ("chair", 1), ("person", 1)],
        "000007": [("car", 0)],
        "000001": [("dog", 1), ("dog", 0), ("person", 0)],
    }
    for image, found in objects.items():
        items = "".join(
            f"<object><name>{name}</name><difficult>{hard}</difficult>{box}</object>" for name, hard in found
        )
        write(
            root / "Annotations" / f"{image}.xml", f"<annotation><filename>{image}.jpg</filename>{items}</annotation>"
        )
        paint(root / "JPEGImages" / f"{image}.jpg", image)
    write(root / "ImageSets" / "Main" / "trainval.txt", "000005\n000007\n")
    write(root / "ImageSets" / "Main" / "test.txt", "000001\n")
    return top / "VOCdevkit"


def imagenet(top: Path) -> Path:
    return class_tree(top / "imagenet", {"train": ["n01440764", "n01443537"], "val": ["n01440764", "n01443537"]})


def imagenette(top: Path) -> Path:
    return class_tree(top / "imagenette2-320", {"train": sorted(TEN), "val": sorted(TEN)}, 1)


BUILD: dict[str, Build] = {
    "imagenet-1k": imagenet,
    "imagenette": imagenette,
    "places205": places,
    "aircraft": aircraft,
    "cub": cub,
    "caltech101": caltech,
    "cars": cars,
    "dtd": dtd,
    "flowers102": flowers,
    "food101": food,
    "pets": pets,
    "sun397": sun,
    "voc2007": voc,
}
EXPECTED: dict[str, tuple[list[int], list[int], tuple[str, str]]] = {
    "imagenet-1k": ([0, 0, 1, 1], [0, 0, 1, 1], ("train", "val")),
    "imagenette": (list(range(10)), list(range(10)), ("train", "val")),
    "places205": ([0, 204], [0, 0, 204], ("train", "val")),
    "aircraft": ([2, 0], [1, 2, 0], ("trainval", "test")),
    "cub": ([0, 1], [0, 1, 1], ("train", "test")),
    "caltech101": ([0] * 30 + [1] * 30, [0, 0, 0, 1, 1], ("train (30 per class)", "val (30 per class)")),
    "cars": ([1, 0], [0, 1, 1], ("train", "test")),
    "dtd": ([1, 0, 0, 1], [1, 0], ("train1+val1", "test1")),
    "flowers102": ([76, 4, 0, 0], [76, 101, 4], ("trnid+valid", "tstid")),
    "food101": ([1, 0, 0], [0, 1], ("train", "test")),
    "pets": ([0, 1], [0, 1, 1], ("trainval", "test")),
    "sun397": ([2, 1], [1, 2, 2], ("Training_01", "Testing_01")),
}


def pixels(examples: Examples) -> list[bytes]:
    return [examples.read(index).tobytes() for index in range(len(examples))]


def test_every_name_has_a_layout() -> None:
    assert list(DATASETS) == list(LAYOUTS)
    assert BUILD.keys() | {"cifar10", "cifar100"} == DATASETS.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_labels_and_splits_of_the_official_layout(name: str, tmp_path: Path) -> None:
    root = BUILD[name](tmp_path)
    train, val, notes = open_splits(name, root)
    labels = EXPECTED[name]
    assert (train.labels.tolist(), val.labels.tolist()) == labels[:2]
    assert (train.data.split, val.data.split) == labels[2]
    assert (train.data.name, train.data.n, len(val)) == (name, len(labels[0]), len(labels[1]))
    assert notes == [note for note in map(count_note, (train.data, val.data)) if note]
    assert len(notes) == 2
    assert not set(pixels(train)) & set(pixels(val))
    assert len(set(pixels(train))) == len(train)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_folder_may_be_given_at_any_usual_level(name: str, tmp_path: Path) -> None:
    near, far = open_labelled(name, BUILD[name](tmp_path), "val"), open_labelled(name, tmp_path, "val")
    assert near.data == far.data
    assert near.names == far.names


def test_all_sets_below_one_folder(tmp_path: Path) -> None:
    for name, build in BUILD.items():
        if name not in ("sun397", "places205"):  # whose lists and images lie side by side
            build(tmp_path)
    for name in BUILD.keys() & EXPECTED.keys() - {"sun397", "places205"}:
        assert open_labelled(name, tmp_path, "val").labels.tolist() == EXPECTED[name][1], name


ORACLES: dict[str, Callable[[Path, str], Any]] = {
    "aircraft": lambda top, split: tv.FGVCAircraft(top, {"train": "trainval", "val": "test"}[split]),
    "cars": lambda top, split: tv.StanfordCars(top, {"train": "train", "val": "test"}[split]),
    "dtd": lambda top, split: (
        torch.utils.data.ConcatDataset([tv.DTD(top, "train"), tv.DTD(top, "val")])
        if split == "train"
        else tv.DTD(top, "test")
    ),
    "food101": lambda top, split: tv.Food101(top, {"train": "train", "val": "test"}[split]),
    "pets": lambda top, split: tv.OxfordIIITPet(top, {"train": "trainval", "val": "test"}[split]),
    "flowers102": lambda top, split: (
        torch.utils.data.ConcatDataset([AnyFlowers(top, "train"), AnyFlowers(top, "val")])
        if split == "train"
        else AnyFlowers(top, "test")
    ),
    "imagenet-1k": lambda top, split: tv.ImageFolder(top / "imagenet" / split),
}


class AnyFlowers(tv.Flowers102):
    _file_dict = {name: (file, None) for name, (file, _) in tv.Flowers102._file_dict.items()}  # noqa: RUF012


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ORACLES)
def test_same_as_torchvision(name: str, split: str, tmp_path: Path) -> None:
    BUILD[name](tmp_path)
    ours, theirs = open_labelled(name, tmp_path, split), ORACLES[name](tmp_path, split)
    assert ours.labels.tolist() == [label for _, label in theirs]
    assert pixels(ours) == [image.convert("RGB").tobytes() for image, _ in theirs]


def test_caltech_is_split_as_its_images_not_as_their_number(tmp_path: Path) -> None:
    root = caltech(tmp_path)
    held_out = [name.split("/", 1)[1] for name in open_labelled("caltech101", root, "val").names]
    drawn = {"Faces": [4, 19, 29], "accordion": [6, 30]}  # as written down once: on no machine may it be another draw
    assert held_out == [f"{name}/image_{number:04d}.jpg" for name, numbers in drawn.items() for number in numbers]
    before = set(open_labelled("caltech101", root, "train").names)
    for name in open_labelled("caltech101", root, "val").names[:2]:
        (root / name).unlink()
    assert set(open_labelled("caltech101", root, "train").names) == before
    for path in sorted((root / "101_ObjectCategories" / "accordion").glob("*.jpg"))[:2]:
        path.unlink()
    with pytest.raises(InputError, match=r"accordion: 30 images; a class needs more than 30"):
        open_labelled("caltech101", root, "train")


def test_voc_has_several_classes_per_image(tmp_path: Path) -> None:
    train, val, _ = open_splits("voc2007", voc(tmp_path))
    assert train.labels.shape == (2, 20)
    column = {name: index for index, name in enumerate(train.classes)}
    assert train.labels[0].nonzero().flatten().tolist() == [column["chair"], column["person"]]
    assert train.labels[0, [column["chair"], column["person"]]].tolist() == [1, -1]
    assert train.labels[1].nonzero().flatten().tolist() == [column["car"]]
    assert val.labels[0, [column["dog"], column["person"]]].tolist() == [1, 1]
    assert (train.data.split, val.data.split) == ("trainval", "test")
    assert open_labelled("voc2007", tmp_path / "VOCdevkit" / "VOC2007", "val").data == val.data
    assert open_labelled("voc2007", tmp_path, "val").data == val.data


def test_voc_with_only_another_year(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "VOCdevkit" / "VOC2007").rename(tmp_path / "VOCdevkit" / "VOC2012")
    with pytest.raises(InputError, match=r"no VOC2007 with"):
        open_labelled("voc2007", tmp_path / "VOCdevkit", "val")


def test_note_on_counts() -> None:
    def record(n: int) -> DataRecord:
        return DataRecord(name="dtd", split="test1", n=n, hash="")

    assert count_note(record(1880)) is None
    assert count_note(record(1879)) == "warning: dtd test1 has 1,879 images here, officially 1,880"
    assert count_note(DataRecord(name="elsewhere", split="test1", n=1, hash="")) is None


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - {"imagenet-1k", "imagenette", "caltech101"}))
def test_image_that_is_listed_but_missing(name: str, tmp_path: Path) -> None:
    root = BUILD[name](tmp_path)
    examples = open_labelled(name, root, "val")
    assert examples.folder is not None
    (examples.folder / examples.names[0]).unlink()
    with pytest.raises(InputError, match=r"listed but not there|no images such as"):
        open_labelled(name, root, "val")


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("pets", "annotations/test.txt", "Abyssinian_2 38 1 1\n", r"class '38' is not in 1 to 37"),
        ("pets", "annotations/test.txt", "Abyssinian_2 0 1 1\n", r"class '0' is not in 1 to 37"),
        ("pets", "annotations/test.txt", "Abyssinian_2\n", r"'Abyssinian_2' has not 4 columns"),
        ("pets", "annotations/test.txt", "\n \n", r"the list is empty"),
        (
            "pets",
            "annotations/test.txt",
            "../../secret 1 1 1\n",
            r"'images/../../secret.jpg': a list of \S+ leads out of it",
        ),
        ("pets", "annotations/test.txt", "a\0b 1 1 1\n", r"listed but not there"),
        ("cub", "image_class_labels.txt", "1 1\n2 1\n3 2\n4 3\n5 2\n", r"class '3' is not in 1 to 2"),
        ("cub", "image_class_labels.txt", "1 1\n2 1\n", r"name different images"),
        ("aircraft", "data/images_variant_test.txt", "0034311 Boeing 999\n", r"no class is called 'Boeing 999'"),
        ("dtd", "labels/test1.txt", "/etc/passwd\n", r"images/etc/passwd: listed but not there"),
        ("sun397", "Partitions/Testing_01.txt", "/c/cave/sun_1.jpg\n", r"no class is called 'c/cave'"),
        ("places205", "trainvalsplit_places205/val_places205.csv", "a/abbey/gsun_3.jpg 205\n", r"not in 0 to 204"),
        ("places205", "trainvalsplit_places205/val_places205.csv", "a/abbey/gsun_3.jpg\n", r"has not 2 columns"),
        ("places205", "trainvalsplit_places205/val_places205.csv", "q/quay/gsun_3.jpg 7\n", r"no images such as"),
    ],
)
def test_damaged_lists(name: str, file: str, text: str, message: str, tmp_path: Path) -> None:
    root = BUILD[name](tmp_path)
    (root / file).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        open_labelled(name, root, "val")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file"),
    [("flowers102", "imagelabels.mat"), ("flowers102", "setid.mat"), ("cars", "cars_test_annos_withlabels.mat")],
)
def test_damaged_matlab_files(name: str, file: str, tmp_path: Path) -> None:
    root = BUILD[name](tmp_path)
    good = (root / file).read_bytes()
    random = np.random.default_rng(0)
    for trial in range(40):
        damaged = np.frombuffer(good, dtype=np.uint8).copy()
        if trial % 2:
            damaged = damaged[: random.integers(len(damaged))]
        else:
            damaged[random.integers(0, len(damaged), 4)] = random.integers(0, 256, 4)
        (root / file).write_bytes(damaged.tobytes())
        try:
            open_labelled(name, root, "val")
        except InputError as error:
            assert "\n" not in str(error)
    (root / file).unlink()
    with pytest.raises(InputError, match=file):
        open_labelled(name, root, "val")


def test_flower_beyond_the_labels(tmp_path: Path) -> None:
    root = flowers(tmp_path)
    savemat(root / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[8]]})
    with pytest.raises(InputError, match=r"setid.mat: names images beyond the 7"):
        open_labelled("flowers102", root, "val")
    savemat(root / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[1.5]]})
    with pytest.raises(InputError, match=r"tstid is no row of whole numbers"):
        open_labelled("flowers102", root, "val")


def test_cars_without_labels(tmp_path: Path) -> None:
    root = cars(tmp_path)
    table = np.array([(1, "00001.jpg")], dtype=[("bbox_x1", "O"), ("fname", "O")])
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": table[None]})
    with pytest.raises(InputError, match=r"no fname and class; take the file with the labels"):
        open_labelled("cars", root, "val")


@pytest.mark.parametrize(
    ("dataset", "folder", "message"),
    [
        ("flowers", ".", r"--dataset flowers: give imagenet-1k, .*; did you mean flowers102\?"),
        ("dtd", "nowhere", r"nowhere: no such folder"),
        ("dtd", None, r"no data: give --data DIR or set VITREG_DATA"),
        (None, None, r"no data: give --data DIR or set VITREG_DATA"),
        ("dtd", ".", r"no dtd there or up to two levels below \(looked for labels/train1.txt; as class folders"),
        (None, ".", r"no folder val, valid, validation, eval, evaluation, test"),
    ],
)
def test_what_is_not_there(
    dataset: str | None, folder: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITREG_DATA", raising=False)
    with pytest.raises(InputError, match=message) as caught:
        open_labelled(dataset, None if folder is None else tmp_path / folder, "val")
    assert "\n" not in str(caught.value)


def test_the_folder_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITREG_DATA", str(root := cub(tmp_path)))
    assert open_labelled("cub", None, "val").data == open_labelled("cub", root, "val").data


def test_empty_split(tmp_path: Path) -> None:
    root = class_tree(tmp_path, {"train": ["ant"]})
    (root / "val").mkdir()
    with pytest.raises(InputError, match=r"0 class folders found"):
        open_labelled(None, root, "val")
    (root / "val" / "ant").mkdir()
    with pytest.raises(InputError, match=r"0 images found"):
        open_labelled(None, root, "val")
    everything = cub(tmp_path)
    write(everything / "train_test_split.txt", "".join(f"{number} 1\n" for number in range(1, 6)))
    with pytest.raises(InputError, match=r"the test split of cub is empty"):
        open_labelled("cub", everything, "val")


@pytest.mark.real_data
def test_voc_of_the_sample_data(shared_data: Path) -> None:
    folder = shared_data / "VOCdevkit"
    if not (folder / "VOC2007" / "ImageSets" / "Main" / "test.txt").is_file():
        pytest.skip("no VOC 2007 test images in the sample data")
    val = open_labelled("voc2007", folder, "val")
    assert set(val.labels.unique().tolist()) <= {-1, 0, 1}
