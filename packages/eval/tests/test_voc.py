from pathlib import Path

import pytest
import torch
from vitreg_core.errors import InputError
from vitreg_eval.datasets.voc import voc_images

TRICKY = """<annotation>
  <filename>2008_000001.jpg</filename>
  <size><width>100</width><height>80</height><depth>3</depth></size>
  <object>
    <bndbox><ymax>70</ymax><xmax>60.9</xmax><ymin>1</ymin><xmin>45.70000076293945</xmin></bndbox>
    <part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>
    <difficult>1</difficult>
    <name>person</name>
    <part><name>foot</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>6</xmax><ymax>6</ymax></bndbox></part>
  </object>
  <object>
    <part><name>hand</name><bndbox><xmin>7</xmin><ymin>7</ymin><xmax>8</xmax><ymax>8</ymax></bndbox></part>
    <name> dog </name>
    <truncated>1</truncated>
    <difficult>0</difficult>
    <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>100</xmax><ymax>80</ymax></bndbox>
  </object>
</annotation>
"""
EMPTY = "<annotation><filename>renamed.jpg</filename></annotation>"
BOX = "<bndbox><xmin>{}</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"


def write_year(folder: Path, lists: dict[str, str]) -> Path:
    """A tiny devkit: two images, whatever the lists say."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for image, text in (("2008_000001", TRICKY), ("2008_000002", EMPTY)):
        (folder / "Annotations" / f"{image}.xml").write_text(text)
        (folder / "JPEGImages" / f"{image}.jpg").touch()
    for name, text in lists.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """The VOC2012 folder of a devkit."""
    lists = {
        "trainval": "2008_000002\n2008_000001\n",
        "train": "2008_000001 \n\n",
        "dog_train": "2008_000001  1\n2008_000002 -1",
        "val": "\n",
    }
    return write_year(tmp_path / "data" / "VOCdevkit" / "VOC2012", lists)


def test_boxes_are_half_open_and_come_from_objects_not_from_their_parts(voc: Path) -> None:
    (image,) = voc_images(voc, 2012, "train")
    assert torch.equal(image.boxes, torch.tensor([[44, 0, 60, 70], [0, 0, 100, 80]]))
    assert image.boxes.dtype == torch.int64
    assert image.classes == ("person", "dog")
    assert image.difficult.tolist() == [True, False]
    assert image.truncated.tolist() == [False, True]
    assert image.path == voc / "JPEGImages" / "2008_000001.jpg"


@pytest.mark.parametrize(
    "content",
    [
        b'<?xml version="1.0" encoding="utf-32"?><annotation/>',
        b'<?xml version="1.0" encoding="none"?><annotation/>',
        b"<annotation><object>",
        b"\xff\xfe",
    ],
)
def test_annotations_that_are_no_xml_are_named(voc: Path, content: bytes) -> None:
    (voc / "Annotations" / "2008_000001.xml").write_bytes(content)
    with pytest.raises(InputError, match=r"2008_000001\.xml: not valid XML .*; unpack the annotations again"):
        voc_images(voc, 2012, "train")


def test_a_list_that_is_no_text_is_named(voc: Path) -> None:
    (voc / "ImageSets/Main/train.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"train\.txt: not a readable list"):
        voc_images(voc, 2012, "train")


def test_the_list_gives_the_images_and_their_order(voc: Path) -> None:
    (voc / "Annotations" / "2008_000003.xml").write_text("in no list, never read")
    images = voc_images(voc, 2012)
    assert [image.id for image in images] == ["2008_000002", "2008_000001"]
    assert [image.name for image in images] == ["renamed.jpg", "2008_000001.jpg"]


def test_an_image_may_have_no_objects(voc: Path) -> None:
    empty = voc_images(voc, 2012)[0]
    assert empty.boxes.shape == (0, 4)
    assert empty.classes == ()
    assert empty.difficult.dtype == torch.bool


def test_lists_of_one_class_have_a_second_column(voc: Path) -> None:
    assert [image.id for image in voc_images(voc, 2012, "dog_train")] == ["2008_000001", "2008_000002"]


@pytest.mark.parametrize("level", [".", "..", "../..", "../../.."])
def test_every_usual_level_is_accepted(voc: Path, level: str) -> None:
    root = (voc / level).resolve()
    assert [image.id for image in voc_images(root, 2012, "train")] == ["2008_000001"]
    assert [image.id for image in voc_images(str(root), 2012, "train")] == ["2008_000001"]


def test_a_year_folder_with_another_name_is_accepted(voc: Path) -> None:
    assert len(voc_images(voc.rename(voc.parent / "my photos"), 2012)) == 2


@pytest.mark.parametrize("level", ["VOC2007", "."])
def test_the_layout_of_lost_repeats_the_name_of_the_year(tmp_path: Path, level: str) -> None:
    write_year(tmp_path / "VOC2007" / "VOCdevkit" / "VOC2007", {"trainval": "2008_000001"})
    assert len(voc_images(tmp_path / level, 2007)) == 1


def test_trainval_and_test_may_be_unpacked_side_by_side(tmp_path: Path) -> None:
    write_year(tmp_path / "VOCtest_06-Nov-2007/VOCdevkit/VOC2007", {"test": "2008_000001"})
    write_year(tmp_path / "VOCtrainval_06-Nov-2007/VOCdevkit/VOC2007", {"trainval": "2008_000002"})
    assert [image.id for image in voc_images(tmp_path, 2007, "trainval")] == ["2008_000002"]
    assert [image.id for image in voc_images(tmp_path, 2007, "test")] == ["2008_000001"]


def test_a_missing_root_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder; give the unpacked folder that holds VOCdevkit"):
        voc_images(tmp_path / "nowhere", 2012)


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "VOC.tar").touch()
    with pytest.raises(InputError, match=r"VOC\.tar: is a file; give the unpacked folder"):
        voc_images(tmp_path / "VOC.tar", 2012)


@pytest.mark.parametrize("level", ["..", "../.."])
def test_a_missing_year_names_the_years_there_and_the_places_looked_at(voc: Path, level: str) -> None:
    root = (voc / level).resolve()
    with pytest.raises(InputError) as error:
        voc_images(root, 2007)
    assert str(error.value) == (
        f"{root}: no VOC2007 with ImageSets/Main in it; there is VOC2012; looked at {root}, {root}/VOC2007, "
        f"{root}/*/VOC2007, {root}/*/VOCdevkit/VOC2007; give the folder that holds VOCdevkit, or unpack VOC2007 there"
    )


def test_the_folder_of_another_year_is_not_this_year(voc: Path) -> None:
    with pytest.raises(InputError, match="VOC2012: no VOC2007 with ImageSets/Main in it; looked at"):
        voc_images(voc, 2007)


def test_a_missing_split_names_the_splits_there_and_the_nearest(voc: Path) -> None:
    advice = r"split 'trainvall': no trainvall.txt in .*/Main; use train or trainval or val; did you mean trainval\?"
    with pytest.raises(InputError, match=advice):
        voc_images(voc, 2012, "trainvall")


def test_a_year_without_lists_asks_for_a_complete_copy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"split 'trainval': no trainval\.txt in .*; use a complete copy of VOC"):
        voc_images(write_year(tmp_path / "VOC2007", {}), 2007)


def test_an_empty_list_is_named(voc: Path) -> None:
    with pytest.raises(InputError, match=r"Main/val\.txt: the list is empty; unpack VOC2012 again"):
        voc_images(voc, 2012, "val")


@pytest.mark.parametrize("name", ["Annotations/2008_000001.xml", "JPEGImages/2008_000001.jpg"])
def test_a_missing_file_is_named(voc: Path, name: str) -> None:
    (voc / name).unlink()
    with pytest.raises(InputError, match=f"{name}: listed in ImageSets/Main but missing; unpack VOC2012 again"):
        voc_images(voc, 2012)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<annotation><object>", "not valid XML"),
        ("", "not valid XML"),
        (f"<annotation><object>{BOX.format(1)}</object></annotation>", "an object has no name"),
        ("<annotation><object><name>cat</name></object></annotation>", "bndbox/xmin is None, not a number"),
        (f"<annotation><object><name>cat</name>{BOX.format('left')}</object></annotation>", "xmin is 'left', not a"),
        (f"<annotation><object><name>cat</name>{BOX.format('nan')}</object></annotation>", "xmin is 'nan', not a"),
        (f"<annotation><object><name>cat</name>{BOX.format('inf')}</object></annotation>", "xmin is 'inf', not a"),
        (f"<annotation><object><name>cat</name>{BOX.format(10)}</object></annotation>", r"a cat is empty, \[10, 2, 9"),
    ],
)
def test_a_broken_annotation_is_named(voc: Path, text: str, problem: str) -> None:
    (voc / "Annotations" / "2008_000001.xml").write_text(text)
    with pytest.raises(InputError, match=rf"2008_000001\.xml: .*{problem}.*; unpack the annotations again"):
        voc_images(voc, 2012, "train")


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("year", "splits", "counts"),
    [(2012, ["trainval"], (205, 644, 92)), (2007, ["trainval", "test"], (39, 167, 29))],
)
def test_the_sample_has_the_counts_of_its_description(
    shared_data: Path, year: int, splits: list[str], counts: tuple[int, int, int]
) -> None:
    if not (shared_data / "VOCdevkit").is_dir():
        pytest.skip(f"no VOCdevkit in {shared_data}")
    images = [image for split in splits for image in voc_images(shared_data, year, split)]
    boxes = sum(len(image.boxes) for image in images)
    difficult = sum(int(image.difficult.sum()) for image in images)
    assert (len(images), boxes, difficult) == counts
