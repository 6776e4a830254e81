import multiprocessing
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_dataset, create_transform
from torch import Tensor
from vitreg_core.data.images import labelled_images
from vitreg_core.data.scenes import NUM_RELATIONS, SHAPES, TEXTURES, draw_scenes
from vitreg_core.errors import InputError
from vitreg_recipes.augment import seeded
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data import Share, open_data
from vitreg_recipes.data.order import Shuffled, Steps
from vitreg_recipes.data.photos import PhotoData

Tiny = Callable[..., TrainConfig]
CPU = torch.device("cpu")
ALONE = Share(size=4, process=0, processes=1)


def images(config: TrainConfig, count: int, *, step: int = 0, share: Share = ALONE) -> Tensor:
    """Images of some steps, one after the other."""
    return torch.cat([batch.images for batch in islice(open_data(config).batches(step, share, CPU), count)])


@pytest.mark.parametrize("label", ["class", "relation"])
def test_scenes_are_those_of_their_step_and_process(tiny: Tiny, label: str) -> None:
    config = tiny(seed=7, data__label=label)
    share = Share(size=4, process=1, processes=2)
    batch = next(open_data(config).batches(3, share, CPU))
    scenes = draw_scenes(4, (7, 3, 1), image_size=16)
    torch.testing.assert_close(batch.images, scenes.image * 2 - 1)
    assert torch.equal(batch.labels, scenes.relation if label == "relation" else scenes.label)
    assert not torch.equal(batch.images, images(config, 1, step=3))


def test_classes_are_those_of_the_data(tiny: Tiny, photos: Path) -> None:
    assert open_data(tiny(data__label="class")).classes == list(TEXTURES)
    relations = open_data(tiny(data__label="relation")).classes
    assert (len(relations), relations[len(SHAPES) + 1]) == (NUM_RELATIONS, f"{TEXTURES[1]}, {SHAPES[1]}")
    assert open_data(tiny(data__path=str(photos))).classes == ["cat", "dog"]
    assert open_data(tiny(data__path=str(photos / "train"))).classes == ["cat", "dog"]


def test_photos_are_the_same_for_any_workers_and_any_start(tiny: Tiny, photos: Path) -> None:
    config = tiny(data__path=str(photos))
    whole = images(config, 4)
    assert torch.equal(whole, images(tiny(data__path=str(photos), data__workers=2), 4))
    assert torch.equal(whole[8:], images(config, 2, step=2))
    assert not torch.equal(whole, images(tiny(data__path=str(photos), seed=1), 4))


def test_photos_are_the_same_over_any_number_of_processes(tiny: Tiny, photos: Path) -> None:
    config = tiny(data__path=str(photos))
    shares = [images(config, 1, step=1, share=Share(size=2, process=rank, processes=2)) for rank in range(2)]
    assert torch.equal(torch.cat(shares), images(config, 1, step=1))


def test_labels_belong_to_the_images(tiny: Tiny, photos: Path) -> None:
    shutil.rmtree(photos / "train" / "cat")
    (photos / "train" / "bird").mkdir()
    for path in (photos / "train" / "dog").iterdir():
        shutil.copy(path, photos / "train" / "bird")
    files, pairs = labelled_images(photos / "train"), next(iter(Steps(Shuffled(8, 0), 0, ALONE)))
    batch = next(open_data(tiny(data__path=str(photos))).batches(0, ALONE, CPU))
    assert batch.labels.tolist() == [files.labels[index] for _, index in pairs]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_and_named_once(
    tiny: Tiny, photos: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    broken = photos / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    data = open_data(tiny(data__path=str(photos), data__workers=workers))
    batches = list(islice(data.batches(0, ALONE, CPU), 7))
    assert all(batch.images.isfinite().all() for batch in batches)
    assert data.skipped == {str(broken)}
    assert capsys.readouterr().err.count("dog/1.png: not a readable image, the next one takes its place") == 1


def test_too_many_unreadable_images_are_an_error(tiny: Tiny, photos: Path) -> None:
    for path in list(photos.rglob("*.png"))[:4]:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"train: 4 of 7 images cannot be read, such as .*png; mend or remove them"):
        images(tiny(data__path=str(photos)), 7)


def odd_pictures(folder: Path) -> dict[str, Image.Image]:
    """Files that training must read, with what Pillow makes of them."""
    plain = Image.effect_mandelbrot((24, 20), (-2, -1, 1, 1), 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.asarray(plain, np.uint16) * 257
    moving = {"save_all": True, "append_images": [Image.new("L", plain.size)]}
    colour = plain.convert("RGB")
    plain.convert("CMYK").save(folder / "cmyk.jpg")
    plain.save(folder / "grey.png")
    plain.convert("LA").save(folder / "grey_alpha.png")
    plain.convert("RGBA").save(folder / "alpha.png")
    plain.convert("P").save(folder / "palette.png", transparency=bytes(range(256)))
    Image.fromarray(deep).save(folder / "deep.png")
    colour.save(folder / "turned.jpg", exif=exif)
    plain.save(folder / "moving.gif", **moving)
    plain.save(folder / "really_png.jpg", "PNG")
    shapes = {"dot.png": (1, 1), "line.png": (1, 300), "wide.png": (5000, 2)}
    for name, size in shapes.items():
        Image.new("RGB", size, "red").save(folder / name)
    with Image.open(folder / "turned.jpg") as turned, Image.open(folder / "cmyk.jpg") as cmyk:
        special = {"turned.jpg": ImageOps.exif_transpose(turned), "cmyk.jpg": cmyk.convert("RGB")}
    names = ["grey.png", "grey_alpha.png", "alpha.png", "palette.png", "deep.png", "moving.gif", "really_png.jpg"]
    return special | dict.fromkeys(names, colour) | {n: Image.new("RGB", size, "red") for n, size in shapes.items()}


def test_odd_images_are_read_and_broken_ones_counted(tiny: Tiny, photos: Path) -> None:
    folder = photos / "train" / "dog"
    expected = odd_pictures(folder)
    (folder / "empty.jpg").touch()
    (folder / "cut.png").write_bytes((folder / "grey.png").read_bytes()[:60])
    (folder / "text.jpg").write_text("no picture")
    (folder / "folder.jpg").mkdir()
    (folder / "gone.jpg").symlink_to("nowhere")
    data = open_data(tiny(data__path=str(photos), data__batch_size=6))
    assert isinstance(data, PhotoData)
    read = {Path(data.photos.name(n)).name: n for n in range(data.images)}
    for name, picture in expected.items():
        ours = data.photos.read(read[name])
        assert (ours.mode, ours.size, ours.tobytes()) == (picture.mode, picture.size, picture.tobytes()), name
    batches = list(islice(data.batches(0, ALONE, CPU), data.epoch_steps(ALONE) + 1))
    assert all(batch.images.isfinite().all() for batch in batches)
    assert {Path(name).name for name in data.skipped} == {"empty.jpg", "cut.png", "text.jpg"}


@pytest.mark.parametrize("augment", ["three_simple_crop", "rand_augment"])
def test_every_augmentation_takes_pictures_of_any_shape(tiny: Tiny, photos: Path, augment: str) -> None:
    for number, size in enumerate([(1, 1), (1, 300), (20000, 1), (2, 5000), (3, 3)]):
        Image.new("RGB", size, "red").save(photos / "train" / "dog" / f"shape{number}.png")
    config = tiny(data__path=str(photos), data__augment=augment)
    assert images(config, 3).isfinite().all()
    assert not torch.equal(images(config, 1), images(tiny(data__path=str(photos)), 1))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves files open
def test_pixels_are_those_of_timms_data_set_and_transform(tiny: Tiny, photos: Path) -> None:
    transform = create_transform(16, is_training=True, auto_augment="3a", color_jitter=0.3, interpolation="bicubic")
    theirs = create_dataset("", str(photos / "train"), transform=transform)
    ours = images(tiny(data__path=str(photos)), 2, step=3)
    pairs = [pair for step in islice(Steps(Shuffled(7, 0), 3, ALONE), 2) for pair in step]
    for (place, index), image in zip(pairs, ours, strict=True):
        with seeded(0, place):
            assert torch.equal(theirs[index][0], image)


def test_copies_of_an_image_differ(tiny: Tiny, photos: Path) -> None:
    config = tiny(data__path=str(photos), data__repeats=3, data__batch_size=6)
    share = Share(size=6, process=0, processes=1)
    data = open_data(config)
    batch = next(data.batches(0, share, CPU))
    assert data.epoch_steps(share) == 1
    assert torch.equal(batch.labels, batch.labels[[0, 0, 0, 3, 3, 3]])
    assert len({tuple(image.flatten().tolist()) for image in batch.images}) == 6
    assert torch.equal(images(config, 3, share=share)[12:], images(config, 1, step=2, share=share))


def test_workers_outlive_a_signal_to_the_whole_job_and_end_with_their_parent(tiny: Tiny, photos: Path) -> None:
    batches = open_data(tiny(data__path=str(photos), data__workers=1)).batches(0, ALONE, CPU)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for name in ("TERM", "INT"):  # from another process, as a scheduler sends them
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    time.sleep(0.2)
    assert len(list(islice(batches, 8))) == 8
    assert worker.is_alive()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0


def test_a_folder_without_images_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    def refuse(message: str) -> None:
        with pytest.raises(InputError, match=message):
            open_data(tiny(data__path=str(tmp_path)))

    refuse("0 class folders found; put the images of each class into a sub-folder")
    (tmp_path / "1.jpg").touch()
    refuse("0 class folders found, and 1 images without a class; put the images of each class into a sub-folder")
    (tmp_path / "cat").mkdir()
    refuse("0 images found")
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "1.png")
    refuse(r"1 class found \(cat\); a classifier needs at least two")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no such folder; give scenes, a folder with one sub-folder of images per class, hub:org/name, or"),
        ("photo.jpg", "no such folder; .* or shards such as 'shards/\\*.tar' or 'shards/\\*.parquet', in quotes"),
        ("shards-{0..9}.tar", "0 files found; in a pattern, \\* stands for any letters and \\? for one"),
        ("nothing/*.parquet", "0 files found; in a pattern"),
    ],
)
def test_a_path_that_leads_nowhere_says_what_can_be_given(tiny: Tiny, path: str, message: str) -> None:
    with pytest.raises(InputError, match=f"data.path=.*: {message}"):
        open_data(tiny(data__path=path))


def test_scenes_have_epochs_and_are_not_repeated(tiny: Tiny) -> None:
    assert open_data(tiny()).epoch_steps(ALONE) == 1000
    with pytest.raises(InputError, match=r"data.repeats=3 with data.path=scenes: .* set repeats to 1"):
        open_data(tiny(data__repeats=3))


def seed_all() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def test_seeded_draws_the_same_and_leaves_the_generators_alone() -> None:
    def draw() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002

    seed_all()
    without = draw()
    seed_all()
    with seeded(3, 4):
        inside = draw()
    assert draw() == without
    with seeded(3, 4):
        assert draw() == inside
    with seeded(3, 5):
        assert draw() != inside
