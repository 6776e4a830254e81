import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from vitreg_core.errors import InputError
from vitreg_eval.config import DepthOptions
from vitreg_eval.datasets.depth import mean_depth, open_depth
from vitreg_eval.datasets.kitti import kitti_pairs
from vitreg_eval.datasets.nyu import nyu_pairs
from vitreg_eval.datasets.rgbd import rgbd_pairs
from vitreg_eval.datasets.sun_rgbd import sun_rgbd_pairs


def write_pair(image: Path, depth: Path, raw: np.ndarray | int, size: tuple[int, int] = (12, 16)) -> None:
    """A picture of random pixels and a 16 bit file of depth; sizes are height and width."""
    for path in (image, depth):
        path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    Image.fromarray(np.broadcast_to(np.asarray(raw, dtype=np.uint16), size).copy()).save(depth)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The simplest layout: one pair in each list."""
    for split in ("train", "test"):
        write_pair(tmp_path / "a" / f"rgb_{split}.jpg", tmp_path / "a" / f"depth_{split}.png", 2000)
        (tmp_path / f"{split}.txt").write_text(f"a/rgb_{split}.jpg a/depth_{split}.png\n")
    return tmp_path


# NYU Depth v2


@pytest.mark.parametrize("level", ["", "nyu_depth_v2", "NYU"])
@pytest.mark.parametrize(
    ("split", "listing", "place"),
    [
        ("train", "nyu_train.txt", "sync"),
        ("train", "nyudepthv2_train_files_with_gt.txt", ""),
        ("test", "nyu_test.txt", "official_splits/test"),
        ("test", "test.txt", ""),
    ],
)
def test_nyu_is_found_at_its_usual_places(
    tmp_path: Path, level: str, split: Literal["train", "test"], listing: str, place: str
) -> None:
    root = tmp_path / level
    raw = np.arange(12 * 16).reshape(12, 16) * 10
    write_pair(root / place / "den_1/rgb_00045.jpg", root / place / "den_1/sync_depth_00045.png", raw)
    (root / listing).write_text("/den_1/rgb_00045.jpg /den_1/sync_depth_00045.png 518.8579")
    pairs = nyu_pairs(tmp_path, split)
    image, depth = pairs.read(0)
    assert (image.size, image.mode) == ((16, 12), "RGB")
    assert torch.equal(depth, torch.from_numpy(raw.astype(np.float32) / np.float32(1000)))
    assert (pairs.data.name, pairs.data.split, pairs.data.n) == ("nyu", split, 1)
    assert "den_1/rgb_00045.jpg" in pairs.names[0]


def test_nyu_that_is_not_there_is_named_with_the_places(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"list of the NYU Depth v2 test split not found; looked for .*nyu_test\.txt"):
        nyu_pairs(tmp_path, "test")


def put_h5py(monkeypatch: pytest.MonkeyPatch, content: dict[str, np.ndarray]) -> None:
    """Stand in for the package: every file holds the same arrays."""
    module = ModuleType("h5py")
    vars(module)["File"] = lambda path, mode: content
    monkeypatch.setitem(sys.modules, "h5py", module)


def test_the_labelled_frames_of_nyu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed as HDF5 gives them; frames count from 1; raw depth is cut to millimetres, pictures to their frame."""
    generator = np.random.default_rng(0)
    frames: dict[str, np.ndarray] = {
        "images": generator.integers(1, 256, (3, 3, 640, 480), dtype=np.uint8),
        "rawDepths": generator.uniform(1, 4, (3, 640, 480)).astype(np.float32),
    }
    put_h5py(monkeypatch, frames)
    (tmp_path / "nyu_depth_v2_labeled.mat").touch()
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[3]]), "testNdxs": np.array([[2], [1]])})
    pairs = nyu_pairs(tmp_path, "test")
    assert list(pairs.names) == ["frame 1", "frame 0"]
    image, depth = pairs.read(0)
    pixels = np.asarray(image)
    assert pixels.shape == (480, 640, 3)
    assert (pixels[7, 7], pixels[473, 631]) == (
        pytest.approx(frames["images"][1][:, 7, 7]),
        pytest.approx(frames["images"][1][:, 631, 473]),
    )
    assert pixels[:7].max() == pixels[474:].max() == pixels[:, :7].max() == pixels[:, 632:].max() == 0
    assert depth[100, 200].item() == pytest.approx(np.floor(frames["rawDepths"][1][200, 100] * 1000) / 1000)


def test_damaged_splits_of_nyu_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_h5py(monkeypatch, {})
    (tmp_path / "nyu_depth_v2_labeled.mat").touch()
    with pytest.raises(InputError, match=r"splits\.mat: no such file"):
        nyu_pairs(tmp_path, "test")
    (tmp_path / "splits.mat").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"splits\.mat: not the official splits"):
        nyu_pairs(tmp_path, "test")


def test_the_labelled_frames_need_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "nyu_depth_v2_labeled.mat").touch()
    with pytest.raises(InputError, match=r"reading nyu_depth_v2_labeled\.mat needs h5py; install it"):
        nyu_pairs(tmp_path, "test")


# KITTI


@pytest.mark.parametrize(
    ("images", "depths"), [("input", "gt_depth"), ("raw", "data_depth_annotated/val"), ("", "train")]
)
def test_kitti_is_cut_to_the_middle_of_the_lower_edge(tmp_path: Path, images: str, depths: str) -> None:
    image, depth = "2011_09_26/drive/image_02/data/69.png", "drive/proj_depth/groundtruth/image_02/69.png"
    raw = np.zeros((375, 1242), dtype=np.uint16)
    raw[23, 13], raw[374, 1228], raw[22, 13], raw[23, 12] = 256 * 20, 256 * 30, 256 * 40, 256 * 50
    write_pair(tmp_path / images / image, tmp_path / depths / depth, raw, (375, 1242))
    (tmp_path / "kitti_eigen_test.txt").write_text(f"{image} {depth} 721.5\nmissing.png None 721.5\n")
    pairs = kitti_pairs(tmp_path, "test")
    assert len(pairs) == 1
    picture, metres = pairs.read(0)
    assert picture.size == (1216, 352)
    assert metres[0, 0] == 20
    assert metres[351, 1215] == 30
    assert metres.sum() == 50
    whole = np.asarray(Image.open(tmp_path / images / image))
    np.testing.assert_array_equal(np.asarray(picture), whole[23:, 13:1229])


def test_kitti_of_another_size_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "a.png", tmp_path / "b.png", 256)
    (tmp_path / "kitti_eigen_test.txt").write_text("a.png b.png 721.5")
    with pytest.raises(InputError, match="KITTI picture of 16x12, at least 1216x352 expected"):
        kitti_pairs(tmp_path, "test").read(0)


# SUN RGB-D


@pytest.mark.parametrize("layout", ["list", "toolbox"])
def test_the_bits_of_sun_rgbd_are_put_back(tmp_path: Path, layout: str) -> None:
    """Millimetres are stored turned left by three bits; what is beyond 8 m counts as 8 m."""
    room = "SUNRGBD/kv2/kinect2data/000065_2014"
    millimetres = np.zeros((12, 16), dtype=np.uint16)
    millimetres[0, :5] = 1, 2345, 7999, 9000, 65535
    stored = ((millimetres.astype(np.uint32) << 3) | (millimetres >> 13)).astype(np.uint16)
    write_pair(tmp_path / room / "image/0000065.jpg", tmp_path / room / "depth_bfx/0000065.png", stored)
    if layout == "list":
        (tmp_path / "SUNRGBD_val_splits.txt").write_text(f"{room}/image/0000065.jpg {room}/depth_bfx/0000065.png\n")
    else:
        entries = np.empty((1, 1), dtype=object)
        entries[0, 0] = f"/n/fs/sun3d/data/{room}/"
        savemat(tmp_path / "allsplit.mat", {"alltest": entries})
    pairs = sun_rgbd_pairs(tmp_path)
    assert pairs.read(0)[1][0, :6].tolist() == pytest.approx([0.001, 2.345, 7.999, 8, 8, 0])


def test_a_room_of_sun_rgbd_that_is_missing_is_named(tmp_path: Path) -> None:
    entries = np.empty((1, 1), dtype=object)
    entries[0, 0] = "/n/fs/sun3d/data/SUNRGBD/kv1/NYUdata/NYU0001/"
    savemat(tmp_path / "allsplit.mat", {"alltest": entries})
    with pytest.raises(InputError, match="NYU0001/image: 0 files, one expected, which the split lists"):
        sun_rgbd_pairs(tmp_path)
    savemat(tmp_path / "allsplit.mat", {"alltest": np.zeros((1, 0), dtype=object)})
    with pytest.raises(InputError, match="0 test folders, some without SUNRGBD/"):
        sun_rgbd_pairs(tmp_path)


# Any folder


@pytest.mark.parametrize(
    ("image", "depth"),
    [
        ("a/rgb_00001.jpg", "a/sync_depth_00001.png"),
        ("rgb/00001.jpg", "depth/00001.png"),
        ("frame-000001.color.png", "frame-000001.depth.png"),
        ("images/x.jpg", "depth/x.png"),
    ],
)
def test_pairs_are_found_by_their_names(tmp_path: Path, image: str, depth: str) -> None:
    for split in ("train", "val"):
        write_pair(tmp_path / split / image, tmp_path / split / depth, 1500)
    pairs = rgbd_pairs(tmp_path, "test", scale=500.0)
    assert list(pairs.names) == [f"val/{image}"]
    assert pairs.read(0)[1].unique().tolist() == [3.0]


def test_a_picture_without_depth_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path / "train/rgb_1.jpg", tmp_path / "train/depth_1.png", 1500)
    Image.new("RGB", (16, 12)).save(tmp_path / "train/rgb_2.jpg")
    with pytest.raises(InputError, match=r"rgb_2\.jpg: no depth, such as depth_1\.png for rgb_1\.jpg with a name like"):
        rgbd_pairs(tmp_path, "train")


def test_a_folder_without_splits_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no test\.txt and no folder test or val or validation in it"):
        rgbd_pairs(tmp_path, "test")


# What goes wrong


def open_rgbd(folder: Path, **options: float) -> None:
    data = open_depth(DepthOptions.model_validate({"dataset": "rgbd", "data": folder, **options}), "test")
    data.pairs.read(0)


@pytest.mark.parametrize(
    ("raw", "options", "median"),
    [(2, {}, "0.002"), (20_000, {}, "20"), (2000, {"depth_scale": 10}, "200"), (2000, {"max_depth": 1.5}, "2")],
)
def test_depth_in_another_unit_is_named(folder: Path, raw: int, options: dict[str, float], median: str) -> None:
    write_pair(folder / "a/rgb_test.jpg", folder / "a/depth_test.png", raw)
    with pytest.raises(InputError, match=rf"test: median depth {median} m, expected 0\.05 to .* as --depth_scale"):
        open_rgbd(folder, **options)


def test_centimetres_are_named(folder: Path) -> None:
    write_pair(folder / "a/rgb_test.jpg", folder / "a/depth_test.png", 250)
    with pytest.raises(InputError, match=r"test: 99% of the depths are below 0\.25 m, of up to 10 m; .* --depth_scale"):
        open_rgbd(folder)
    open_rgbd(folder, depth_scale=100)
    open_rgbd(folder, max_depth=1)  # a table top


def test_numbers_beyond_16_bits_are_not_wrapped(folder: Path) -> None:
    for worst in (70_000, -1):
        raw = np.full((12, 16), 2000, dtype=np.int32)
        raw[0, 0] = worst
        Image.fromarray(raw).save(folder / "a/depth_test.tif")
        (folder / "test.txt").write_text("a/rgb_test.jpg a/depth_test.tif\n")
        with pytest.raises(InputError, match=rf"depth_test\.tif: depths from .*{worst}.*; they must be 16 bits"):
            open_rgbd(folder)


def test_the_unit_can_be_given(folder: Path) -> None:
    write_pair(folder / "a/rgb_test.jpg", folder / "a/depth_test.png", 20_000)
    open_rgbd(folder, depth_scale=5000)


def test_depth_without_any_reading_is_named(folder: Path) -> None:
    write_pair(folder / "a/rgb_test.jpg", folder / "a/depth_test.png", 0)
    with pytest.raises(InputError, match="1 pictures of depth have no reading at all; check the files of a/rgb_test"):
        open_rgbd(folder)


def test_depth_of_another_size_is_named(folder: Path) -> None:
    Image.fromarray(np.full((12, 20), 2000, dtype=np.uint16)).save(folder / "a/depth_test.png")
    with pytest.raises(InputError, match=r"depth_test\.png: depth of 20x12 for a picture of 16x12; align them"):
        open_rgbd(folder)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_depth_without_16_bits_is_named(folder: Path, mode: str) -> None:
    Image.new(mode, (16, 12)).save(folder / "a/depth_test.png")
    with pytest.raises(
        InputError, match=rf"depth_test\.png: depth with mode {mode}; it must be one channel of 16 bits"
    ):
        open_rgbd(folder)


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ("", r"test\.txt: 0 pairs listed"),
        ("\n  \n", r"test\.txt: 0 pairs listed"),
        ("a/rgb_test.jpg", r"test\.txt: line 1 is 'a/rgb_test\.jpg'; write 'image depth"),
        ("a/rgb_9.jpg a/depth_9.png", r"rgb_9\.jpg: no such file, but the split lists it"),
        ("../x.jpg a/depth_test.png", r"'\.\./x\.jpg' leads out of"),
        ("a/rgb_test.jpg a/../../y.png", r"leads out of"),
        ("\udce9\udce8", "not a text file"),
    ],
)
def test_bad_lists_are_named(folder: Path, listing: str, message: str) -> None:
    (folder / "test.txt").write_bytes(listing.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message):
        open_rgbd(folder)


def test_damaged_files_are_named(folder: Path) -> None:
    (folder / "a/depth_test.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    with pytest.raises(InputError, match=r"depth_test\.png: not a readable picture of depth"):
        open_rgbd(folder)


def test_the_record_changes_with_the_files(folder: Path) -> None:
    before = rgbd_pairs(folder, "test").data
    assert rgbd_pairs(folder, "test").data == before
    write_pair(folder / "a/rgb_test.jpg", folder / "a/depth_test.png", np.arange(192).reshape(12, 16))
    assert rgbd_pairs(folder, "test").data.hash != before.hash


def test_the_mean_depth_is_that_of_the_readings_in_range(folder: Path) -> None:
    raw = np.zeros((12, 16))
    raw[0, :3] = 1000, 3000, 30_000
    write_pair(folder / "a/rgb_test.jpg", folder / "a/depth_test.png", raw)
    data = open_depth(DepthOptions(dataset="rgbd", data=folder), "test")
    assert mean_depth(data) == pytest.approx(2)


@pytest.mark.real_data
def test_the_sample_sets_open(shared_data: Path) -> None:
    rooms = open_depth(DepthOptions(dataset="rgbd", data=shared_data / "seven-scenes"), "train")
    assert len(rooms.pairs) == 75
    assert 1 < mean_depth(rooms) < 3
    nyu = open_depth(DepthOptions(dataset="nyu", data=shared_data / "nyu_depth_v2"), "test")
    image, depth = nyu.pairs.read(0)
    assert image.size == (160, 120)
    assert 0 < depth.max() <= 10
