from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vitreg_core.errors import InputError
from vitreg_eval.config import SegmentOptions
from vitreg_eval.datasets.ade20k import ade20k
from vitreg_eval.datasets.cityscapes import cityscapes
from vitreg_eval.datasets.masks import open_masks, read_mask
from vitreg_eval.datasets.segmentation import open_segmentation
from vitreg_eval.datasets.voc_masks import voc_masks

SIZE = (5, 4)


def write_image(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 10, 10)).save(path)


def write_mask(path: Path, values: list[int], size: tuple[int, int] = SIZE, mode: str = "L") -> None:
    """A mask whose first pixels have these values and the others the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    flat = values + [values[-1]] * (width * height - len(values))
    image = Image.fromarray(np.array(flat, dtype=np.uint8).reshape(height, width), mode="L")
    if mode == "P":
        image = image.convert("L")
        image.putpalette([channel for index in range(256) for channel in (index * 37 % 256, index * 11 % 256, 7)])
    image.save(path)


# ADE20K


def write_ade(root: Path) -> None:
    for split, short in (("training", "train"), ("validation", "val")):
        for number in (1, 2):
            write_image(root / "images" / split / f"ADE_{short}_0000000{number}.jpg")
            write_mask(root / "annotations" / split / f"ADE_{short}_0000000{number}.png", [0, 1, 150, 255, number])


@pytest.mark.parametrize("below", ["", "ADEChallengeData2016", "ade/ADEChallengeData2016"])
def test_ade20k_shifts_labels_by_one_and_ignores_0_and_255(tmp_path: Path, below: str) -> None:
    write_ade(tmp_path / below)
    found = ade20k(tmp_path, "train")
    assert (len(found.pairs), len(found.classes), found.pairs.data.split) == (2, 150, "train")
    picture, mask = found.pairs.read(1)
    assert picture.size == SIZE
    assert mask.shape == (4, 5)
    assert mask.flatten()[:5].tolist() == [255, 0, 149, 255, 1]


def test_ade20k_takes_the_lists_of_dinov3_and_its_names(tmp_path: Path) -> None:
    write_ade(tmp_path)
    (tmp_path / "ADE20K_object150_val.txt").write_text("validation/ADE_val_00000002.jpg\n")
    rows = ["Idx\tRatio\tTrain\tVal\tName"] + [f"{n}\t0.1\t2\t3\tname {n}, other" for n in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    found = ade20k(tmp_path, "val")
    assert [Path(name).name for name in found.pairs.names] == ["ADE_val_00000002.jpg"]
    assert found.classes[0] == "name 1"
    (tmp_path / "ADE20K_object150_val.txt").write_text("../secret.jpg\n")
    with pytest.raises(InputError, match=r"'../secret.jpg' is not below images"):
        ade20k(tmp_path, "val")
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows[:100]))
    with pytest.raises(InputError, match="99 classes, not 150"):
        ade20k(tmp_path, "train")


@pytest.mark.parametrize(
    "file", ["ADE20K_2021_17_01/index_ade20k.pkl", "images/ADE/training/x.jpg", "images/training/a/b/ADE_1_seg.png"]
)
def test_the_full_ade20k_is_refused_with_an_explanation(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    with pytest.raises(
        InputError, match=r"the full ADE20K, whose masks code over 3,000 classes by colour.*ADEChallenge"
    ):
        ade20k(tmp_path, "train")


def test_a_label_beyond_the_classes_is_named_with_its_file(tmp_path: Path) -> None:
    write_ade(tmp_path)
    write_mask(tmp_path / "annotations/training/ADE_train_00000001.png", [1, 151, 151, 1])
    found = ade20k(tmp_path, "train")
    with pytest.raises(InputError, match=r"00000001.png: 2 pixels have the value 151, .* 0 to 150, and 255"):
        found.pairs.read(0)


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        ade20k(tmp_path / "nothing", "train")
    with pytest.raises(InputError, match="no images/training and annotations/training"):
        ade20k(tmp_path, "train")
    for kind in ("images", "annotations"):
        (tmp_path / kind / "training").mkdir(parents=True)
    with pytest.raises(InputError, match="0 images found"):
        ade20k(tmp_path, "train")


# Cityscapes


def write_cityscapes(root: Path, coding: str, values: list[int]) -> None:
    for split in ("train", "val"):
        stem = "aachen_000000_000019"
        write_image(root / "leftImg8bit" / split / "aachen" / f"{stem}_leftImg8bit.png")
        write_mask(root / "gtFine" / split / "aachen" / f"{stem}_gtFine_{coding}.png", values)


@pytest.mark.parametrize(
    ("coding", "values", "expected"),
    [
        ("labelIds", [0, 7, 8, 9, 33, 255, 26], [255, 0, 1, 255, 18, 255, 13]),
        ("labelTrainIds", [0, 18, 255], [0, 18, 255]),
    ],
)
def test_cityscapes_has_19_classes(tmp_path: Path, coding: str, values: list[int], expected: list[int]) -> None:
    write_cityscapes(tmp_path / "cityscapes", coding, values)
    found = cityscapes(tmp_path, "val")
    assert (len(found.classes), found.classes[13], found.classes[18]) == (19, "car", "bicycle")
    assert found.pairs.read(0)[1].flatten()[: len(values)].tolist() == expected


def test_cityscapes_names_what_is_missing_or_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no leftImg8bit/val and gtFine/val"):
        cityscapes(tmp_path, "val")
    write_cityscapes(tmp_path, "labelIds", [34])
    with pytest.raises(InputError, match="the value 34, which names no class"):
        cityscapes(tmp_path, "val").pairs.read(0)
    next((tmp_path / "gtFine/val").rglob("*.png")).unlink()
    with pytest.raises(InputError, match=r"labelIds.png: no such file; each image needs its mask"):
        cityscapes(tmp_path, "val")
    next((tmp_path / "leftImg8bit/val").rglob("*.png")).unlink()
    with pytest.raises(InputError, match="0 images in the val split of cityscapes"):
        cityscapes(tmp_path, "val")


# VOC 2012


def write_voc(root: Path) -> None:
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, name in (("train", "2007_000032"), ("val", "2007_000033")):
        (lists / f"{split}.txt").write_text(f"{name}\n\n")
        write_image(root / "JPEGImages" / f"{name}.jpg")
        write_mask(root / "SegmentationClass" / f"{name}.png", [0, 20, 255, 1], mode="P")


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012", "VOCtrainval_11-May-2012/VOCdevkit/VOC2012"])
def test_voc_reads_palette_indices_and_ignores_the_border(tmp_path: Path, below: str) -> None:
    write_voc(tmp_path / below)
    found = voc_masks(tmp_path, "val")
    assert (len(found.classes), found.pairs.data.split) == (21, "val")
    assert found.pairs.read(0)[1].flatten()[:4].tolist() == [0, 20, 255, 1]


def test_voc_trains_on_the_augmented_masks_where_they_are(tmp_path: Path) -> None:
    write_voc(tmp_path)
    write_image(tmp_path / "JPEGImages/2008_1.jpg")
    for name in ("2008_1", "2007_000032"):
        write_mask(tmp_path / f"SegmentationClassAug/{name}.png", [5])
    with pytest.raises(InputError, match=r"its list trainaug.txt is not"):
        voc_masks(tmp_path, "train")
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_text(
        "/JPEGImages/2008_1.jpg /SegmentationClassAug/2008_1.png\n2007_000032\n"
    )
    found = voc_masks(tmp_path, "train")
    assert (len(found.pairs), found.pairs.data.split) == (2, "trainaug")
    assert found.pairs.read(0)[1].unique().tolist() == [5]
    assert voc_masks(tmp_path, "val").pairs.data.split == "val"
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_text("2007_000033\n")
    write_mask(tmp_path / "SegmentationClassAug/2007_000033.png", [5])
    with pytest.raises(InputError, match=r"2007_000033.jpg: is in the training and in the validation split"):
        open_segmentation(SegmentOptions(dataset="voc12", data=tmp_path))


def test_voc_without_masks_says_so(tmp_path: Path) -> None:
    (tmp_path / "VOC2012" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(InputError, match=r"VOC2012: no SegmentationClass and ImageSets/Segmentation in it; unpack"):
        voc_masks(tmp_path, "val")


# Any folder


def write_folder(root: Path, layout: str) -> None:
    for split in ("train", "val"):
        write_image(root / layout.format(kind="images", split=split) / "sub" / "a.b.jpg")
        mask = layout.format(kind="masks" if "masks" in layout else "annotations", split=split)
        write_mask(root / mask / "sub" / "a.b.png", [0, 1, 2, 255, 3])


@pytest.mark.parametrize("layout", ["{kind}/{split}", "{split}/{kind}"])
def test_a_folder_of_images_and_annotations(tmp_path: Path, layout: str) -> None:
    write_folder(tmp_path, layout)
    found = open_masks(tmp_path, "val")
    assert found.classes == ("class 0", "class 1", "class 2", "class 3")
    assert found.pairs.read(0)[1].flatten()[:5].tolist() == [0, 1, 2, 255, 3]
    shifted = open_masks(tmp_path, "val", ignore_zero=True)
    assert shifted.classes == ("class 1", "class 2", "class 3")
    assert shifted.pairs.read(0)[1].flatten()[:5].tolist() == [255, 0, 1, 255, 2]


def test_the_names_of_classes_come_from_classes_txt(tmp_path: Path) -> None:
    write_folder(tmp_path, "{kind}/{split}")
    (tmp_path / "classes.txt").write_text("sky\nroad\n\ntree\ncar\nbus\n")
    assert open_masks(tmp_path, "train").classes == ("sky", "road", "tree", "car", "bus")
    (tmp_path / "classes.txt").write_text("index\tname\n0\tnone\n1\tsky\n2\tsea\n3\ttree top\n")
    assert open_masks(tmp_path, "train", ignore_zero=True).classes == ("sky", "sea", "tree top")
    (tmp_path / "classes.txt").write_text("1\tsky\n3\tsea\n")
    with pytest.raises(InputError, match="do not count 0, 1, 2"):
        open_masks(tmp_path, "train")
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    with pytest.raises(InputError, match=r"a.b.png: 1 pixels have the value 2, .* 0 to 1,"):
        open_masks(tmp_path, "train").pairs.read(0)
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(256))))
    with pytest.raises(InputError, match="256 classes; give masks of 2 to 255 classes"):
        open_masks(tmp_path, "train")


def test_numbers_that_count_no_classes_are_refused_at_once(tmp_path: Path) -> None:
    write_folder(tmp_path, "{kind}/{split}")
    values = np.full((4, 5), 2**31 - 1, dtype=np.int32)
    (tmp_path / "annotations/train/sub/a.b.png").unlink()
    Image.fromarray(values).save(tmp_path / "annotations/train/sub/a.b.tif")
    with pytest.raises(InputError, match="2147483648 classes; give masks of 2 to 255 classes"):
        open_masks(tmp_path, "train")


def test_a_class_that_only_the_validation_masks_have_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, "{kind}/{split}")
    write_mask(tmp_path / "annotations/val/sub/a.b.png", [4])
    with pytest.raises(InputError, match=r"20 pixels have the value 4"):
        open_masks(tmp_path, "val").pairs.read(0)


def test_masks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, "{kind}/{split}")
    mask = tmp_path / "annotations/train/sub/a.b.png"
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    write_mask(mask, [1], size=(4, 5))
    with pytest.raises(InputError, match=r"a.b.png: 4 x 5 pixels, its image a.b.jpg has 5 x 4"):
        open_masks(tmp_path, "train").pairs.read(0)
    Image.new("RGB", SIZE).save(mask)
    with pytest.raises(InputError, match=r"a.b.png: a mask of mode RGB, coded by colour; give one channel"):
        open_masks(tmp_path, "train").pairs.read(0)
    Image.fromarray(np.full((4, 5), 3, dtype=np.uint16)).save(mask)
    assert read_mask(mask, {3: 3}).tolist() == torch.full((4, 5), 3).tolist()
    Image.fromarray(np.full((4, 5), 700, dtype=np.uint16)).save(mask)
    with pytest.raises(InputError, match=r"a.b.png: 20 pixels have the value 700"):
        open_masks(tmp_path, "train").pairs.read(0)
    mask.write_bytes(b"\x89PNG but no more")
    with pytest.raises(InputError, match=r"a.b.png: not a readable mask"):
        open_masks(tmp_path, "train").pairs.read(0)
    mask.unlink()
    with pytest.raises(InputError, match=r"a.b.jpg: its mask a.b.png is not in .*annotations/train/sub; add it"):
        open_masks(tmp_path, "train")


def test_a_folder_without_a_split_or_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images/training or train/images in it"):
        open_masks(tmp_path, "train")
    for kind in ("images", "annotations"):
        (tmp_path / kind / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="0 images found"):
        open_masks(tmp_path, "train")


def test_a_limit_spreads_over_the_split_and_has_its_own_hash(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number in range(6):
            write_image(tmp_path / "images" / split / f"{number}.jpg")
            write_mask(tmp_path / "annotations" / split / f"{number}.png", [number % 3])
    options = SegmentOptions(dataset="masks", data=tmp_path)
    all_of, some = open_segmentation(options), open_segmentation(options.model_copy(update={"limit": 3}))
    assert [Path(name).stem for name in some.test.pairs.names] == ["0", "2", "4"]
    assert [int(some.test.pairs.read(index)[1][0, 0]) for index in range(3)] == [0, 2, 1]
    assert (some.test.pairs.data.n, all_of.test.pairs.data.n) == (3, 6)
    assert some.test.pairs.data.hash != all_of.test.pairs.data.hash


# Sample data


@pytest.mark.real_data
def test_the_sample_of_ade20k_reads(shared_data: Path) -> None:
    for split, count in (("train", 6), ("val", 9)):
        found = ade20k(shared_data, split)
        assert len(found.pairs) == count
        assert found.classes[:4] == ("wall", "building", "sky", "floor")
        masks = [found.pairs.read(index)[1] for index in range(count)]
        assert all(mask[mask != 255].max() < 150 for mask in masks)


@pytest.mark.real_data
def test_the_sample_of_coco_reads(shared_data: Path) -> None:
    found = open_masks(shared_data / "coco-semseg", "val", ignore_zero=True)
    assert (len(found.pairs), len(found.classes), found.classes[0]) == (100, 133, "person")
    picture, mask = found.pairs.read(3)
    assert picture.size == (mask.shape[1], mask.shape[0])
