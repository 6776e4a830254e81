import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import Preprocess, cut_ends, decode_image, labelled_images, list_images, read_image
from vitreg_core.errors import InputError


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (64, 64), (40, 500)])
@pytest.mark.parametrize(("crop", "interpolation"), [(0.9, "bicubic"), (1.0, "bilinear"), (0.875, "bicubic")])
def test_preprocess_equals_timm(size: tuple[int, int], crop: float, interpolation: str) -> None:
    config = PreprocessConfig(image_size=96, crop_ratio=crop, interpolation=interpolation)  # type: ignore[arg-type]
    theirs = create_transform((3, 96, 96), interpolation=interpolation, crop_pct=crop, mean=config.mean, std=config.std)
    image = photo(*size)
    torch.testing.assert_close(Preprocess(config)(image), theirs(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("crop", [0.9, 1.0])
def test_squashing_equals_timm(crop: float) -> None:
    config = PreprocessConfig(image_size=96, crop_ratio=crop, resize="squash")
    theirs = create_transform(
        (3, 96, 96), interpolation="bicubic", crop_pct=crop, mean=config.mean, std=config.std, crop_mode="squash"
    )
    image = photo(201, 333)
    torch.testing.assert_close(Preprocess(config)(image), theirs(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P"])
def test_pictures_of_any_mode_become_three_channels(mode: str) -> None:
    assert Preprocess(PreprocessConfig(image_size=32))(photo(50, 40).convert(mode)).shape == (3, 32, 32)


def test_what_is_not_an_image_is_named(tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    with pytest.raises(InputError, match=r"text\.jpg: not a readable image \(no known format\); replace or remove it"):
        read_image(text)
    whole = tmp_path / "whole.png"
    photo(90, 90).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:500])
    with pytest.raises(InputError, match=r"cut\.png: not a readable image"):
        read_image(cut)


def same(ours: Image.Image, theirs: Image.Image) -> bool:
    return (ours.mode, ours.size, ours.tobytes()) == (theirs.mode, theirs.size, theirs.tobytes())


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *[("CMYK", "jpg"), ("L", "jpg"), ("YCbCr", "jpg"), ("RGBA", "webp"), ("P", "gif"), ("RGB", "bmp")],
        *[(mode, "png") for mode in ("1", "L", "LA", "P", "RGBA")],
        *[(mode, "tif") for mode in ("CMYK", "LAB", "F")],
    ],
)
def test_files_of_any_mode_read_as_pillow_converts_them(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    photo(50, 40).convert("RGB" if mode == "LAB" else mode).save(path)
    with Image.open(path) as image:
        assert same(read_image(path), image.convert("RGB"))


def test_transparency_is_dropped_and_colours_stay(tmp_path: Path) -> None:
    clear = photo(24, 16).convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    assert same(read_image(tmp_path / "clear.png"), photo(24, 16))
    palette = photo(24, 16).quantize(16)
    palette.save(tmp_path / "palette.png", transparency=bytes(range(16)))  # of which Pillow warns
    assert same(read_image(tmp_path / "palette.png"), palette.convert("RGB"))
    grey = photo(24, 16).convert("LA")
    grey.putalpha(7)
    grey.save(tmp_path / "grey.png")
    assert same(read_image(tmp_path / "grey.png"), photo(24, 16).convert("L").convert("RGB"))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_as_pillow_scales_sixteen_bit_colour(tmp_path: Path, suffix: str) -> None:
    values = np.arange(0, 65536, 37, dtype=np.uint16)[:1764].reshape(42, 42)
    path = tmp_path / f"deep.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5\n42 42\n65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    colour = Image.frombytes("RGB", (42, 42), np.repeat(values, 3).astype("<u2").tobytes(), "raw", "RGB;16L")
    assert same(read_image(path), colour)


@pytest.mark.parametrize("turn", range(9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_turns_a_picture_as_pillow_does(tmp_path: Path, turn: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / f"turned.{suffix}"
    photo(40, 24).save(path, exif=exif)
    with Image.open(path) as image:
        assert same(read_image(path), ImageOps.exif_transpose(image))


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(40, 24).save(tmp_path / "whole.jpg", exif=exif)
    data = (tmp_path / "whole.jpg").read_bytes()
    assert decode_image(data, "whole").size == (24, 40)
    assert decode_image(data.replace(b"Exif\0\0MM", b"Exif\0\0M?"), "damaged").size == (40, 24)


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert same(read_image(tmp_path / "moving.gif"), frames[0])


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    photo(20, 10).save(tmp_path / "real.jpg", "PNG")
    assert same(read_image(tmp_path / "real.jpg"), photo(20, 10))
    assert same(decode_image((tmp_path / "real.jpg").read_bytes(), "bytes"), photo(20, 10))


def test_unreadable_files_of_every_kind_are_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    for name in ("empty.jpg", "folder.jpg", "missing.jpg"):
        with pytest.raises(InputError, match=rf"{name}: not a readable image \(.+\); replace or remove it"):
            read_image(tmp_path / name)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)  # permissions do not bind the superuser, who may run the tests
    with pytest.raises(InputError, match=r"locked\.jpg: not a readable image \(.*Permission denied"):
        read_image(tmp_path / "locked.jpg")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_any_damage_is_read_or_refused(form: str) -> None:
    numbers, buffer = random.Random(0), io.BytesIO()
    photo(24, 20).save(buffer, form)
    read = 0
    for _ in range(200):
        data = bytearray(buffer.getvalue()[: numbers.choice([None, numbers.randrange(500)])])
        for _ in range(numbers.randrange(1, 6)):
            place = numbers.randrange(len(data) + 1)
            data[place : place + 1] = bytes([numbers.randrange(256)])
        try:
            image = decode_image(bytes(data), "damaged")
        except InputError as error:
            assert str(error).startswith("damaged: not a readable image (")
            assert "\n" not in str(error)
        else:
            read += image.mode == "RGB"
    assert read < 200


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (70, 1), (1, 6000), (30000, 2)])
def test_pictures_of_any_shape_become_square(size: tuple[int, int]) -> None:
    prepared = Preprocess(PreprocessConfig(image_size=32))(Image.new("RGB", size, (255, 0, 0)))
    torch.testing.assert_close(prepared, Preprocess(PreprocessConfig(image_size=32))(Image.new("RGB", (32, 32), "red")))


def test_ends_are_cut_off_evenly_and_only_from_very_long_pictures() -> None:
    row = Image.fromarray(np.arange(250, dtype=np.uint8)[None].repeat(3, 0))
    assert cut_ends(row) is row
    line = row.crop((0, 0, 250, 1))
    assert list(cut_ends(line).tobytes()) == list(range(75, 175))
    assert list(cut_ends(line.transpose(Image.Transpose.ROTATE_90)).tobytes()) == list(range(174, 74, -1))


def test_folders_are_listed_in_order(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a/1.png", "a/3.jpg", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["1.png", "3.jpg", "2.PNG"]
    found = labelled_images(tmp_path)
    assert (found.classes, found.labels, len(found)) == (["a", "b"], [0, 0, 1], 3)


@pytest.mark.parametrize("search", [list_images, labelled_images])
def test_missing_and_empty_folders_are_named(tmp_path: Path, search: object) -> None:
    assert callable(search)
    with pytest.raises(InputError, match="no such folder; give a folder"):
        search(tmp_path / "missing")
    with pytest.raises(InputError, match=r"0 (images|class folders) found"):
        search(tmp_path)


def test_bare_images_and_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    (tmp_path / ".thumbnails").mkdir()
    for name in ("1.png", "2.jpg", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(
        InputError, match=r"0 class folders found, and 2 images without a class; put the images of each"
    ):
        labelled_images(tmp_path)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=r"cannot be opened \(Permission denied\); give a folder that you may read"):
        labelled_images(tmp_path)


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match="cat: 0 images found"):
        labelled_images(tmp_path)
