"""CIFAR from files written here as the official ones are; torchvision, which unpickles anything, reads them too."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as tv
from vitreg_core.errors import InputError
from vitreg_eval.datasets.labelled import open_labelled, open_splits

BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
NAMES = {"cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]}
NAMES["cifar100"] = [f"class_{number}" for number in range(100)]


def dump(path: Path, content: object, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))


def images(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_ten(top: Path, protocol: int = 2) -> Path:
    root = top / "cifar-10-batches-py"
    for seed, name in enumerate([*BATCHES, "test_batch"]):
        data = {"data": images(seed, 2), "labels": [seed, 9], "batch_label": name, "filenames": ["a.png", "b.png"]}
        dump(root / name, data, protocol)
    dump(root / "batches.meta", {"label_names": NAMES["cifar10"], "num_vis": 3072}, protocol)
    return root


def write_hundred(top: Path) -> Path:
    root = top / "cifar-100-python"
    for seed, name in enumerate(("train", "test")):
        data = {"data": images(seed, 3), "fine_labels": [99, 0, 5 + seed], "coarse_labels": [1, 2, 3]}
        dump(root / name, data)
    dump(root / "meta", {"fine_label_names": NAMES["cifar100"], "coarse_label_names": ["x"] * 20})
    return root


class Ten(tv.CIFAR10):
    train_list = [[name, None] for name in BATCHES]  # noqa: RUF012
    test_list = [["test_batch", None]]  # noqa: RUF012
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}  # noqa: RUF012


class Hundred(tv.CIFAR100):
    train_list = [["train", None]]  # noqa: RUF012
    test_list = [["test", None]]  # noqa: RUF012
    meta = {"filename": "meta", "key": "fine_label_names", "md5": None}  # noqa: RUF012


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("split", ["train", "val"])
def test_cifar10_as_torchvision(split: str, protocol: int, tmp_path: Path) -> None:
    root = write_ten(tmp_path, protocol)
    ours, theirs = open_labelled("cifar10", root, split), Ten(tmp_path, train=split == "train")
    assert ours.labels.tolist() == theirs.targets
    assert list(ours.classes) == theirs.classes
    assert [ours.read(i).tobytes() for i in range(len(ours))] == [image.tobytes() for image, _ in theirs]
    assert ours.read(0).size == (32, 32)
    assert open_labelled("cifar10", tmp_path, split).data == ours.data


@pytest.mark.parametrize("split", ["train", "val"])
def test_cifar100_as_torchvision(split: str, tmp_path: Path) -> None:
    root = write_hundred(tmp_path)
    ours, theirs = open_labelled("cifar100", root, split), Hundred(tmp_path, train=split == "train")
    assert ours.labels.tolist() == theirs.targets
    assert list(ours.classes) == theirs.classes
    assert ours.read(2).tobytes() == theirs[2][0].tobytes()


def test_binary_version_holds_the_same(tmp_path: Path) -> None:
    write_ten(tmp_path)
    root = tmp_path / "binary" / "cifar-10-batches-bin"
    root.mkdir(parents=True)
    for seed, name in enumerate([*BATCHES, "test_batch"]):
        rows = np.concatenate([np.array([[seed], [9]], dtype=np.uint8), images(seed, 2)], axis=1)
        (root / f"{name}.bin").write_bytes(rows.tobytes())
    (root / "batches.meta.txt").write_text("\n".join(NAMES["cifar10"]) + "\n\n")
    for split in ("train", "val"):
        pickled, binary = (open_labelled("cifar10", top, split) for top in (tmp_path / "cifar-10-batches-py", root))
        assert (binary.data, binary.classes) == (pickled.data, pickled.classes)
        assert binary.read(1).tobytes() == pickled.read(1).tobytes()
    (root / "test_batch.bin").write_bytes(b"0" * 3072)
    with pytest.raises(InputError, match=r"3072 bytes are not a multiple of 3073"):
        open_labelled("cifar10", root, "val")


def test_binary_version_of_cifar100_has_the_fine_class_second(tmp_path: Path) -> None:
    for seed, name in enumerate(("train", "test")):
        rows = np.concatenate([np.array([[3, 99], [19, 0]], dtype=np.uint8), images(seed, 2)], axis=1)
        (tmp_path / f"{name}.bin").write_bytes(rows.tobytes())
    (tmp_path / "fine_label_names.txt").write_text("\n".join(NAMES["cifar100"]))
    val = open_labelled("cifar100", tmp_path, "val")
    assert val.labels.tolist() == [99, 0]
    assert np.array_equal(np.array(val.read(0)).transpose(2, 0, 1).reshape(-1), images(1, 2)[0])


def test_both_below_one_folder_and_counts(tmp_path: Path) -> None:
    write_ten(tmp_path)
    write_hundred(tmp_path)
    train, _, notes = open_splits("cifar100", tmp_path)
    assert len(train.classes) == 100
    assert notes[0] == "warning: cifar100 train has 3 images here, officially 50,000"
    assert len(open_splits("cifar10", tmp_path)[0]) == 10


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("file", ["test_batch", "batches.meta"])
def test_a_pickle_cannot_run_code(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_ten(tmp_path)
    dump(root / file, [Harmful()])
    with pytest.raises(InputError, match=rf"{file}: not a pickle of arrays \(it asks for \w+.mkdir\)"):
        open_labelled("cifar10", root, "val")
    assert not (tmp_path / "harmed").exists()
    pickle.loads((root / file).read_bytes())  # what would have happened
    assert (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": images(0, 2), "labels": [0, 10]}, r"class 10 is not in 0 to 9"),
        ({"data": images(0, 2), "labels": [0, -1]}, r"class -1 is not in 0 to 9"),
        ({"data": images(0, 2), "labels": [0, 2**70]}, r"not 3072 bytes and a class"),
        ({"data": images(0, 2), "labels": [0]}, r"not 3072 bytes and a class"),
        ({"data": images(0, 2), "labels": [0, "1"]}, r"not 3072 bytes and a class"),
        ({"data": images(0, 2)[:, :9], "labels": [0, 1]}, r"not 3072 bytes and a class"),
        ({"data": images(0, 2).astype(float), "labels": [0, 1]}, r"not 3072 bytes and a class"),
        ({"labels": [0, 1]}, r"not 3072 bytes and a class"),
        ({"data": images(0, 0), "labels": []}, r"holds no images"),
        ([1, 2], r"holds no dictionary"),
    ],
)
def test_pickles_of_something_else(content: object, message: str, tmp_path: Path) -> None:
    root = write_ten(tmp_path)
    dump(root / "test_batch", content, 4)
    with pytest.raises(InputError, match=rf"test_batch: {message}"):
        open_labelled("cifar10", root, "val")


def test_damaged_pickles(tmp_path: Path) -> None:
    root = write_ten(tmp_path)
    good = np.frombuffer((root / "test_batch").read_bytes(), dtype=np.uint8)
    random = np.random.default_rng(0)
    for trial in range(200):
        damaged = good[: random.integers(len(good))].copy() if trial % 2 else good.copy()
        if len(damaged):
            damaged[random.integers(0, min(len(damaged), 200), 3)] = random.integers(0, 256, 3)
        (root / "test_batch").write_bytes(damaged.tobytes())
        try:
            open_labelled("cifar10", root, "val")
        except InputError as error:
            assert "\n" not in str(error)


def test_missing_files_and_names(tmp_path: Path) -> None:
    root = write_ten(tmp_path)
    dump(root / "batches.meta", {"label_names": ["cat"]})
    with pytest.raises(InputError, match=r"batches.meta: not the names of 10 classes"):
        open_labelled("cifar10", root, "val")
    (root / "data_batch_3").unlink()
    with pytest.raises(InputError, match=r"data_batch_3: cannot be read"):
        open_labelled("cifar10", root, "train")
