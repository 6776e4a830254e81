from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import Preprocess, labelled_images, list_images, read_image
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
    with pytest.raises(InputError, match=r"text\.jpg: not a readable image .*; replace or remove it"):
        read_image(text)
    whole = tmp_path / "whole.png"
    photo(90, 90).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:500])
    with pytest.raises(InputError, match=r"cut\.png: not a readable image"):
        read_image(cut)


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


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match="cat: 0 images found"):
        labelled_images(tmp_path)
