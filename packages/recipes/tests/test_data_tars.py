import io
import json
import os
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data import Share, open_data, open_photos
from vitreg_recipes.data.photos import PhotoData
from vitreg_recipes.data.tars import TarPhotos, cached_index, number_classes

Tiny = Callable[..., TrainConfig]
CPU = torch.device("cpu")
ALONE = Share(size=4, process=0, processes=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder: Path, *, images: int = 21, shards: int = 4) -> str:
    """Shards with `cls` and `json` labels in turn, 0 to 2; a `txt` beside; the last shard is shorter."""
    groups: list[dict[str, bytes]] = [{} for _ in range(shards)]
    for number in range(images):
        group, key = groups[number * shards // images], f"some/dir.v2/{number:04}"
        group[f"{key}.txt"] = b"a caption"
        group[f"{key}.PNG"] = picture(number)
        label = {"cls": str(number % 3).encode(), "json": json.dumps({"label": number % 3, "width": 24}).encode()}
        suffix = ("cls", "json")[number % 2]
        group[f"{key}.{suffix}"] = label[suffix]
    for number, group in enumerate(groups):
        write_tar(folder / f"train-{number:03}.tar", group)
    return str(folder / "train-*.tar")


def images(config: TrainConfig, count: int, *, step: int = 0, share: Share = ALONE) -> Tensor:
    return torch.cat([batch.images for batch in islice(open_data(config).batches(step, share, CPU), count)])


def test_shards_are_read_as_tarfile_reads_them(tmp_path: Path) -> None:
    photos = open_photos(write_shards(tmp_path))
    assert (photos.classes, photos.labels.tolist()) == (["0", "1", "2"], [number % 3 for number in range(21)])
    for number in range(21):
        with Image.open(io.BytesIO(picture(number))) as image:
            assert photos.read(number).tobytes() == image.tobytes()
    assert photos.name(20) == str(tmp_path / "train-003.tar" / "some/dir.v2/0020.PNG")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_shards_resume_at_any_step_with_any_workers(tiny: Tiny, tmp_path: Path, workers: int) -> None:
    path = write_shards(tmp_path)
    whole = images(tiny(data__path=path), 13)
    resumed = images(tiny(data__path=path, data__workers=workers), 6, step=7)
    assert torch.equal(resumed, whole[28:])


def test_shards_are_seen_once_per_epoch_over_processes(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(data__path=write_shards(tmp_path))
    shares = [Share(size=7, process=process, processes=3) for process in range(3)]
    split = torch.cat([images(config, 1, step=2, share=share) for share in shares])
    assert torch.equal(split, images(config, 1, step=2, share=Share(21, 0, 1)))
    labels = [next(open_data(config).batches(2, share, CPU)).labels for share in shares]
    assert torch.cat(labels).bincount().tolist() == [7, 7, 7]
    assert len(split.flatten(1).unique(dim=0)) == 21


def test_the_index_is_kept_until_a_shard_changes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = sorted(Path(write_shards(tmp_path)).parent.glob("*.tar"))
    first = cached_index(shards, labelled=True)
    (kept,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *_: pytest.fail("read a tar again"))
        again = cached_index(shards, labelled=True)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    kept.write_bytes(b"damaged")
    assert len(cached_index(shards, labelled=True).labels) == 21
    os.utime(shards[0], (1, 1))
    cached_index(shards, labelled=True)
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, cache: Path) -> None:
    cache.parent.write_text("a file in the way")
    assert len(open_photos(write_shards(tmp_path)).labels) == 21


def test_labels_may_be_names(tmp_path: Path) -> None:
    files = {"a.jpg": picture(0), "a.cls": b"dog\n", "b.jpg": picture(1), "b.cls": b"cat"}
    photos = open_photos(str(write_tar(tmp_path / "pets.tar", files)))
    assert (photos.classes, photos.labels.tolist()) == (["cat", "dog"], [1, 0])


@pytest.mark.parametrize("below", ["", "train"])
def test_a_folder_of_tars_has_a_class_per_tar(tiny: Tiny, tmp_path: Path, photos: Path, below: str) -> None:
    folder = tmp_path / "tars"
    for name in ("cat", "dog"):
        files = {f"{name}/{path.name}": path.read_bytes() for path in (photos / "train" / name).iterdir()}
        write_tar(folder / below / f"{name}.tar", files | {f"{name}/._1.png": b"", "notes.txt": b""})
    config = tiny(data__path=str(folder))
    assert open_data(config).classes == ["cat", "dog"]
    assert torch.equal(images(config, 3), images(tiny(data__path=str(photos)), 3))  # as if they were unpacked


def test_a_broken_image_in_a_shard_is_replaced_and_named(tiny: Tiny, tmp_path: Path) -> None:
    files = {f"{n}.jpg": picture(n) for n in range(5)} | {f"{n}.cls": b"%d" % (n % 2) for n in range(5)}
    write_tar(tmp_path / "some.tar", files | {"3.jpg": b"broken"})
    data = open_data(tiny(data__path=str(tmp_path / "*.tar")))
    list(islice(data.batches(0, ALONE, CPU), 3))
    assert data.skipped == {str(tmp_path / "some.tar" / "3.jpg")}
    (tmp_path / "some.tar").unlink()
    with pytest.raises(InputError, match=r"some.tar: cannot be read"):
        open_data_of(data).read(0)


def open_data_of(data: object) -> TarPhotos:
    assert isinstance(data, PhotoData)
    assert isinstance(data.photos, TarPhotos)
    return data.photos


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.jpg": b"", "2.jpg": b"", "2.cls": b"0"}, "1 of 2 images have no label, such as 1; put a .cls or .json"),
        ({"1.jpg": b"", "1.json": b"{}"}, "1 of 1 images have no label, .* or give the folder alone if each of its"),
        ({"1.jpg": b"", "1.json": b"{broken"}, "1 of 1 images have no label"),
        ({"1.jpg": b"", "1.cls": b" "}, "1 of 1 images have no label"),
        ({"1.txt": b"", "1.cls": b"0"}, "0 images found; it must hold files such as .*.jpg"),
    ],
)
def test_shards_that_cannot_be_used_are_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    write_tar(tmp_path / "some.tar", files)
    with pytest.raises(InputError, match=rf"some.tar: {message}"):
        open_photos(str(tmp_path / "*.tar"))


def test_damaged_tars_are_named(tmp_path: Path) -> None:
    whole = Path(write_shards(tmp_path, shards=1).replace("*", "000"))
    data = whole.read_bytes()
    damaged = {"empty": b"", "text": b"no tar" * 200, "cut": data[: len(data) // 2], "header": data[:300]}
    for name, content in damaged.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}.tar: not a whole, uncompressed tar .*; fetch or make it again"):
            open_photos(str(tmp_path / f"{name}.tar"))
    for size in [*range(0, len(data.rstrip(b"\0")), 777), len(data.rstrip(b"\0"))]:
        (tmp_path / "cut.tar").write_bytes(data[:size])
        with pytest.raises(InputError, match=r"cut\.tar: not a whole"):
            open_photos(str(tmp_path / "cut.tar"))


def test_shards_and_classes_are_not_confused(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    with pytest.raises(InputError, match=r"holds labels \(.*cls\), so it is a shard, .* pattern: '.*/shards/\*.tar'"):
        open_photos(str(tmp_path / "shards"))
    (tmp_path / "shards" / "cat").mkdir()
    with pytest.raises(
        InputError, match=r"1 sub-folders and 4 tars found; classes are one or the other, move the rest"
    ):
        open_photos(str(tmp_path / "shards"))


def test_labels_that_are_names_in_digits_are_refused() -> None:
    assert number_classes(["3", "0"])[0] == ["0", "1", "2", "3"]
    with pytest.raises(InputError, match=r"label 2102040 among 2 different ones: .* number the classes so"):
        number_classes(["1440764", "2102040"])
