import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vitreg_core.errors import InputError
from vitreg_eval.datasets import coco20k
from vitreg_eval.datasets.coco20k import coco_images

BOXES = {9: [[0.5, 1.5, 2.0, 3.0], [10.4, 20.6, 5.2, 4.0]], 25: [[1.0, 1.0, 1.0, 1.0]], 30: []}
LIST = "train2014/COCO_train2014_000000000025.jpg\ntrain2014/COCO_train2014_000000000009.jpg\n"


def annotations() -> dict[str, Any]:
    """Three images, one without boxes, one with a crowd; boxes of images are not side by side."""
    entries = [
        {"image_id": image, "bbox": list(box), "iscrowd": 0, "category_id": 1}
        for image, own in BOXES.items()
        for box in own
    ]
    crowd = {"image_id": 30, "bbox": [0, 0, 50, 50], "iscrowd": 1, "category_id": 1}
    return {"images": [{"id": 30}, {"id": 9}, {"id": 25}], "annotations": [crowd, entries[1], entries[2], entries[0]]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coco"


def write_coco(root: Path, split: str = "train2014", above: str = "", prefix: str = "COCO_train2014_") -> Path:
    """A tiny COCO."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(annotations()))
    folder = root / above / split
    folder.mkdir(parents=True)
    for image in BOXES:
        (folder / f"{prefix}{image:012d}.jpg").touch()
    (root / "list.txt").write_text(LIST)
    return root


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "data" / "COCO", above="images")


def test_boxes_are_rounded_halves_to_even_and_crowds_are_left_out(coco: Path) -> None:
    found = coco_images(coco, official=False)
    assert [image.id for image in found.images] == [9, 25, 30]
    # the corners 0.5, 1.5, 2.5, 4.5 and 10.4, 20.6, 15.6, 24.6 under Python's round
    expected = [[round(v) for v in (0.5, 1.5, 2.5, 4.5)], [round(v) for v in (10.4, 20.6, 15.6, 24.6)]]
    assert sorted(found.images[0].boxes.tolist()) == sorted(expected) == [[0, 2, 2, 4], [10, 21, 16, 25]]
    assert found.images[1].boxes.tolist() == [[1, 1, 2, 2]]
    assert found.images[2].boxes.shape == (0, 4)
    assert found.images[0].boxes.dtype == torch.int64
    assert found.images[0].path == coco / "images/train2014/COCO_train2014_000000000009.jpg"


def test_a_list_names_the_images_and_its_hash_is_told(coco: Path) -> None:
    found = coco_images(coco, "train2014", coco / "list.txt", official=False)
    assert [image.id for image in found.images] == [9, 25]
    assert found.notes == [f"images of {coco / 'list.txt'}, sha256 {hashlib.sha256(LIST.encode()).hexdigest()}"]


@pytest.mark.parametrize("name", ["000000000009.jpg 1", "x/COCO_val2014_000000000009.JPG", "9.png"])
def test_all_forms_of_names_are_read(coco: Path, name: str) -> None:
    (coco / "list.txt").write_text(f"\n{name}\n")
    assert [image.id for image in coco_images(coco, "train2014", coco / "list.txt", official=False).images] == [9]


@pytest.mark.parametrize("above", ["", "images"])
@pytest.mark.parametrize("level", [".", ".."])
def test_every_usual_level_is_accepted(tmp_path: Path, above: str, level: str) -> None:
    root = write_coco(tmp_path / "COCO", above=above)
    assert len(coco_images((root / level).resolve(), official=False).images) == 3


def test_coco_2017_stands_in_for_2014_and_says_so(tmp_path: Path) -> None:
    root = write_coco(tmp_path, "train2017", prefix="")
    found = coco_images(root, "train2014", official=False)
    assert found.images[0].path.name == "000000000009.jpg"
    assert "boxes of instances_train2017.json, which differ slightly from those of train2014" in found.notes


def test_the_annotations_are_parsed_once(coco: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = coco_images(coco, official=False)
    (copy,) = cache.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(coco20k, "parse", lambda _: pytest.fail("parsed again"))
        again = coco_images(coco, official=False)
    assert [one.boxes.tolist() for one in again.images] == [one.boxes.tolist() for one in first.images]
    copy.write_bytes(copy.read_bytes()[:50])  # as after a kill of some other program
    assert len(coco_images(coco, official=False).images) == 3
    content = annotations()
    content["annotations"] = []
    (coco / "annotations" / "instances_train2014.json").write_text(json.dumps(content))
    assert not any(len(one.boxes) for one in coco_images(coco, official=False).images)


def test_coco20k_takes_the_published_list_only(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"COCO: no coco_20k_filenames\.txt in it; put it there, or give --coco_list"):
        coco_images(coco, official=True)
    (coco / "coco_20k_filenames.txt").write_text(LIST)
    with pytest.raises(
        InputError, match=r"sha256 .*\.\.\. is not that of COCO20k \(74637e9b4f93\.\.\.\); get .* again"
    ):
        coco_images(coco, official=True)
    monkeypatch.setattr(coco20k, "LIST_SHA256", hashlib.sha256(LIST.encode()).hexdigest())
    assert [image.id for image in coco_images(coco.parent, official=True).images] == [9, 25]


def test_an_unknown_image_is_named(coco: Path) -> None:
    (coco / "list.txt").write_text("COCO_train2014_000000000077.jpg")
    with pytest.raises(InputError, match=r"list\.txt: image 77 is not in .*instances_train2014\.json; give the list"):
        coco_images(coco, "train2014", coco / "list.txt", official=False)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not readable as JSON"),
        ("[" * 200_000, "not readable as JSON"),
        ("[]", "no images and annotations in it"),
        ('{"images": []}', "no images and ann"),
    ],
)
def test_broken_annotations_are_named(coco: Path, text: str, problem: str) -> None:
    (coco / "annotations" / "instances_train2014.json").write_text(text)
    with pytest.raises(InputError, match=rf"instances_train2014\.json: {problem}"):
        coco_images(coco, official=False)


@pytest.mark.parametrize(
    "entry",
    [
        {"bbox": [0, 0, 1, 1]},
        {"image_id": 9, "bbox": [0, 0, 1]},
        {"image_id": 9, "bbox": "box"},
        {"image_id": 2**70, "bbox": [0, 0, 1, 1]},
        7,
    ],
)
def test_a_damaged_entry_is_an_error(coco: Path, entry: object) -> None:
    content = annotations() | {"annotations": [entry]}
    (coco / "annotations" / "instances_train2014.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="a damaged entry"):
        coco_images(coco, official=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e300])
def test_a_box_that_is_no_place_is_an_error(coco: Path, value: float) -> None:
    content = annotations()
    content["annotations"][1]["bbox"][0] = value
    (coco / "annotations" / "instances_train2014.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="a box of no picture's size"):
        coco_images(coco, official=False)


def test_missing_parts_are_named(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no annotations of COCO train2014; looked for .*; unpack annotations there"):
        coco_images(tmp_path, official=False)
    with pytest.raises(InputError, match=r"none\.txt: cannot be read"):
        coco_images(coco, "train2014", tmp_path / "none.txt", official=False)
    (coco / "list.txt").write_text("a photo\n")
    with pytest.raises(InputError, match="line 1 is 'a photo'; give names such as"):
        coco_images(coco, "train2014", coco / "list.txt", official=False)
    (coco / "images/train2014/COCO_train2014_000000000025.jpg").unlink()
    with pytest.raises(InputError, match=r"image 25: no .*COCO_train2014_000000000025\.jpg; unpack the images again"):
        coco_images(coco, official=False)


@pytest.mark.real_data
def test_the_sample_has_the_counts_of_its_description(shared_data: Path) -> None:
    """data/README.md: 79 val images, 624 instances of which 5 crowds."""
    found = coco_images(shared_data / "coco", "val2017", official=False)
    assert (len(found.images), sum(len(image.boxes) for image in found.images)) == (79, 619)
