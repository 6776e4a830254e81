from pathlib import Path

import pytest
import torch
from vitreg_core.errors import InputError
from vitreg_eval.datasets import leakage
from vitreg_eval.datasets.examples import Examples
from vitreg_eval.datasets.labelled import open_splits
from vitreg_eval.datasets.layouts import listed
from vitreg_eval.datasets.leakage import check_classes, check_disjoint


def split(
    folder: Path, contents: dict[str, bytes], *, name: str = "mine", classes: tuple[str, ...] = ("a",)
) -> Examples:
    """Examples of files with these bytes; nothing is decoded here."""
    for file, content in contents.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return listed(name, "any", folder, [(file, 0) for file in contents], classes)


def body(last: bytes, size: int = 9000) -> bytes:
    return b"x" * (size - len(last)) + last


def test_files_of_one_folder_pass(tmp_path: Path) -> None:
    train = split(tmp_path, {"image_1.jpg": body(b"1"), "image_2.jpg": body(b"2")})
    val = split(tmp_path, {"image_3.jpg": body(b"3"), "image_4.jpg": body(b"4", 20)})
    assert check_disjoint(train, val) == []  # same size and same first bytes, but not the same content


def test_the_same_file_is_refused(tmp_path: Path) -> None:
    train = split(tmp_path, {"image_1.jpg": body(b"1"), "image_2.jpg": body(b"2")})
    val = listed("mine", "any", tmp_path / ".", [("image_2.jpg", 0), ("image_1.jpg", 0)], ["a"])
    with pytest.raises(InputError, match=r"image_2.jpg: in val, and as \S+image_2.jpg in train and 1 more pairs;"):
        check_disjoint(train, val)


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("name", ["mine", "dtd"])
def test_links_are_refused(link: str, name: str, tmp_path: Path) -> None:
    train = split(tmp_path / "train", {"a.jpg": body(b"1")}, name=name)
    (tmp_path / "val").mkdir()
    getattr(tmp_path / "val" / "b.jpg", link)(tmp_path / "train" / "a.jpg")
    val = listed(name, "val", tmp_path / "val", [("b.jpg", 0)], ["a"])
    with pytest.raises(InputError, match=r"val/b.jpg: in val, and as \S+train/a.jpg in train;"):
        check_disjoint(train, val)


def test_copies_are_refused(tmp_path: Path) -> None:
    train = split(tmp_path / "train", {"a.jpg": body(b"1"), "b.jpg": body(b"2", 10)})
    val = split(tmp_path / "val", {"c.jpg": body(b"3"), "d.jpg": body(b"2", 10)})
    with pytest.raises(InputError, match=r"val/d.jpg: in val, and as \S+train/b.jpg in train; take it out"):
        check_disjoint(train, val)


def test_copies_in_official_splits_are_told(tmp_path: Path) -> None:
    train = split(tmp_path / "train", {"a.jpg": body(b"1"), "b.jpg": body(b"2")}, name="dtd")
    val = split(tmp_path / "val", {"c.jpg": body(b"1"), "d.jpg": body(b"3")}, name="dtd")
    (note,) = check_disjoint(train, val)
    assert note.startswith("1 of the 2 official val images are in train, too: ")
    assert note.endswith(f"{tmp_path}/val/c.jpg as {tmp_path}/train/a.jpg")


def test_too_many_files_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = split(tmp_path / "train", {"a.jpg": body(b"1"), "b.jpg": body(b"2", 30)})
    val = split(tmp_path / "val", {"c.jpg": body(b"1"), "d.jpg": body(b"3", 40)})
    monkeypatch.setattr(leakage, "MOST", 1)
    (note,) = check_disjoint(train, val)
    assert "only paths were" in note
    monkeypatch.setattr(leakage, "MOST", 2)  # files of other sizes do not count
    with pytest.raises(InputError, match=r"c.jpg: in val"):
        check_disjoint(train, val)


def test_places_in_a_file(tmp_path: Path) -> None:
    files = split(tmp_path, {"a": b"1"})

    def rows(*names: str) -> Examples:
        return Examples(files.data, files.classes, torch.zeros(len(names), dtype=torch.int64), files.read, names)

    assert check_disjoint(rows("train row 0"), rows("test row 0")) == []
    with pytest.raises(InputError, match=r"train row 1: in val"):
        check_disjoint(rows("train row 0", "train row 1"), rows("train row 1"))


def test_file_that_vanished(tmp_path: Path) -> None:
    train, val = split(tmp_path, {"a": b"1"}), split(tmp_path, {"b": b"1"})
    (tmp_path / "b").unlink()
    with pytest.raises(InputError, match=r"b: listed but not there"):
        check_disjoint(train, val)


def test_record_changes_with_labels(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    hashes = {listed("mine", "any", tmp_path, [("a", label)], ["x", "y"]).data.hash for label in (0, 1, 0)}
    assert len(hashes) == 2


def test_classes_must_be_the_same(tmp_path: Path) -> None:
    train = split(tmp_path, {"a": b"1"}, classes=("ant", "bee"))
    check_classes(train, train)
    with pytest.raises(InputError, match=r"mine: classes only in train or only in val: \['bee', 'cow'\]"):
        check_classes(train, split(tmp_path, {"b": b"1"}, classes=("ant", "cow")))
    alone = split(tmp_path, {"a": b"1"}, classes=("ant",))
    with pytest.raises(InputError, match="mine: one class, 'ant', which any model names; give two or more"):
        check_classes(alone, alone)


def test_open_splits_refuses_a_copy(tmp_path: Path) -> None:
    for file, content in (("train/ant/1.jpg", b"1"), ("train/bee/2.jpg", b"2"), ("val/ant/3.jpg", b"3")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=r"only in val: \['bee'\]"):
        open_splits(None, tmp_path)
    (tmp_path / "val" / "bee").mkdir()
    (tmp_path / "val" / "bee" / "4.jpg").write_bytes(b"1")
    with pytest.raises(InputError, match=r"val/bee/4.jpg: in val, and as \S+train/ant/1.jpg in train;"):
        open_splits(None, tmp_path)
