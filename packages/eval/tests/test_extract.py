"""Features of image sets: what is kept, on disk as in memory, over kills, full disks and several processes."""

import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from PIL import Image
from torch import Tensor
from vitreg_core.config import ViTConfig
from vitreg_core.data.images import Preprocess, read_image
from vitreg_core.elastic import AutoRegisters
from vitreg_core.errors import InputError
from vitreg_core.features import Features
from vitreg_core.vit import VisionTransformer
from vitreg_eval import store
from vitreg_eval.config import KnnOptions, SegmentOptions
from vitreg_eval.datasets import Batch, ImageSet, image_set, photo_folder, readable_sample, scenes
from vitreg_eval.datasets.examples import Examples
from vitreg_eval.extract import Extracted, Wanted, all_tokens, extract, train_and_test
from vitreg_eval.prefetch import ahead, in_order
from vitreg_eval.results import DataRecord

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, registers=2)
EVERYTHING = Wanted(layers=(0, -1), norm=False, parts=("cls", "registers", "patches", "mean_patch"))
COUNT = 150  # two chunks of scenes, and a part of one


class Counting(VisionTransformer):
    """Counts the images that it is given."""

    seen = 0

    def intermediate(self, images: Tensor, *args: object, **kwargs: object) -> list[Features]:
        self.seen += len(images)
        return super().intermediate(images, *args, **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def model() -> Counting:
    torch.manual_seed(0)
    return Counting(CONFIG).eval()


@pytest.fixture
def drawn(model: Counting) -> ImageSet:
    return scenes(model.preprocess, COUNT, 0, "test")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD", 64)


def run(
    model: VisionTransformer, images: ImageSet, wanted: Wanted = EVERYTHING, cache: Path | None = None
) -> Extracted:
    return extract(model, images, KnnOptions(), wanted, cache)


def assert_same(found: Extracted, expected: Extracted) -> None:
    for ours, theirs in ((found.parts, expected.parts), (found.targets, expected.targets)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
    assert (found.grid, found.data) == (expected.grid, expected.data)


def only_folder(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


def shards(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("shards/*"))


def test_what_is_kept_is_what_the_model_gives(model: Counting, drawn: ImageSet) -> None:
    found = run(model, drawn)
    with torch.no_grad():
        for batch, rows in zip(drawn.batches(), (slice(0, 64), slice(64, 128), slice(128, 150)), strict=True):
            layers = model.intermediate(batch.images, (0, 1), norm=False)
            for index, layer in enumerate(layers):
                assert torch.equal(found.parts["cls"][rows, index], layer.cls)
                assert torch.equal(found.parts["registers"][rows, index], layer.registers)
                assert torch.equal(found.parts["patches"][rows, index], layer.patches)
                torch.testing.assert_close(found.parts["mean_patch"][rows, index], layer.patches.mean(dim=1))
            assert torch.equal(found.targets["mask"][rows], batch.targets["mask"])
    assert torch.equal(found.cls, found.parts["cls"][:, 1])
    assert torch.equal(found.features.patches, found.parts["patches"][:, 1])
    assert (len(found), found.grid) == (COUNT, (4, 4))


def test_class_tokens_of_the_last_layer_are_kept_by_default(model: Counting, drawn: ImageSet) -> None:
    found = extract(model, drawn, KnnOptions())
    assert {name: values.shape for name, values in found.parts.items()} == {"cls": (COUNT, 1, 24)}
    with torch.no_grad():
        expected = torch.cat([model(batch.images).cls for batch in drawn.batches()])
    torch.testing.assert_close(found.cls, expected)


def test_scenes_to_train_and_report_on_keep_all_tokens_by_default(model: Counting) -> None:
    train, test = train_and_test(model, SegmentOptions(train_images=50, test_images=3))
    assert set(test.parts) == {"cls", "registers", "patches"}
    assert (len(train), len(test)) == (50, 3)
    assert set(train_and_test(model, SegmentOptions(train_images=50, test_images=3), Wanted())[1].parts) == {"cls"}


def test_a_cache_gives_the_same_and_is_read_without_the_model(model: Counting, drawn: ImageSet, tmp_path: Path) -> None:
    expected = run(model, drawn)
    assert_same(run(model, drawn, cache=tmp_path), expected)
    model.seen = 0
    again = extract(model, drawn, KnnOptions(cache=tmp_path), EVERYTHING)
    assert_same(again, expected)
    assert model.seen == 0
    assert len(shards(only_folder(tmp_path))) == 3
    mapped = only_folder(tmp_path) / "patches.npy"
    assert str(mapped) in Path("/proc/self/maps").read_text()
    np.testing.assert_array_equal(np.load(mapped), expected.parts["patches"].numpy())


def test_writing_into_what_was_read_leaves_the_cache_alone(model: Counting, drawn: ImageSet, tmp_path: Path) -> None:
    expected = run(model, drawn)
    run(model, drawn, cache=tmp_path).parts["patches"].zero_()
    assert_same(run(model, drawn, cache=tmp_path), expected)


def test_models_without_registers_and_sets_without_targets_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bare = VisionTransformer(CONFIG.model_copy(update={"registers": 0})).eval()
    images = photos(tmp_path / "photos", bare.preprocess)
    assert_same(run(bare, images, all_tokens(bare), tmp_path / "cache"), run(bare, images, all_tokens(bare)))
    found = run(bare, images, all_tokens(bare), tmp_path / "cache")
    assert found.targets == {}
    assert found.parts["registers"].shape == (5, 1, 0, 24)


def photos(folder: Path, preprocess: Preprocess) -> ImageSet:
    generator = np.random.default_rng(0)
    folder.mkdir()
    for index in range(5):
        pixels = generator.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return photo_folder(preprocess, folder, None, 2)


def test_float16_is_the_rounded_float32(model: Counting, drawn: ImageSet, tmp_path: Path) -> None:
    half = Wanted(EVERYTHING.layers, norm=False, parts=EVERYTHING.parts, dtype=torch.float16)
    expected = run(model, drawn)
    for found in (run(model, drawn, half), run(model, drawn, half, tmp_path)):
        assert torch.equal(found.parts["patches"], expected.parts["patches"].half())
        assert found.cls.dtype == torch.float32
    assert (only_folder(tmp_path) / "patches.npy").stat().st_size == 128 + COUNT * 2 * 16 * 24 * 2


def test_other_models_images_and_wishes_have_folders_of_their_own(
    model: Counting, drawn: ImageSet, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = VisionTransformer(CONFIG).eval()
    run(model, drawn, Wanted(), tmp_path)
    run(other, drawn, Wanted(), tmp_path)
    run(model, scenes(model.preprocess, COUNT, 1, "test"), Wanted(), tmp_path)
    run(model, drawn, Wanted(layers=(0,)), tmp_path)
    run(model.with_registers(1), drawn, Wanted(), tmp_path)
    quick = VisionTransformer(CONFIG.model_copy(update={"activation": "quick_gelu"})).eval()
    quick.load_state_dict(model.state_dict())
    run(quick, drawn, Wanted(), tmp_path)
    extract(model, drawn, KnnOptions(precision="bf16"), Wanted(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 7
    run(model, drawn, Wanted(layers=(1,)), tmp_path)  # the last of two
    assert len(list(tmp_path.iterdir())) == 7


def test_features_of_another_model_are_refused_by_hash(model: Counting, drawn: ImageSet, tmp_path: Path) -> None:
    run(model, drawn, cache=tmp_path)
    folder = only_folder(tmp_path)
    kept = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    torch.manual_seed(1)
    other = VisionTransformer(CONFIG).eval()
    with pytest.raises(InputError, match=r"holds features of another model \(other weights\): model is [0-9a-f]{12}"):
        run(other, drawn, cache=folder)
    for wanted, line in (
        (Wanted(layers=(0,)), r"other layers: layers is \[0, 1\] there, \[0\] here"),
        (Wanted(EVERYTHING.layers, norm=False, parts=EVERYTHING.parts, dtype=torch.float16), "dtype is float32 there"),
        (Wanted(EVERYTHING.layers, parts=EVERYTHING.parts), "before or after the final norm"),
    ):
        with pytest.raises(InputError, match=line):
            run(model, drawn, wanted, folder)
    with pytest.raises(InputError, match="of other images: data is"):
        run(model, scenes(model.preprocess, COUNT, 1, "test"), cache=folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == kept
    model.seen = 0
    run(model, drawn, cache=folder)
    assert model.seen == 0


def test_an_automatic_choice_of_registers_is_never_cached(model: Counting, drawn: ImageSet, tmp_path: Path) -> None:
    run(AutoRegisters(model, 1.5), drawn, Wanted(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_was_stopped_goes_on_at_the_missing_shards(model: Counting, drawn: ImageSet, tmp_path: Path) -> None:
    def broken(start: int, stop: int) -> Iterator[Batch]:
        if start >= 64:
            raise InputError("7.png: not a readable image")
        yield from drawn.batches(start, stop)

    with pytest.raises(InputError, match=r"7\.png"):
        run(model, ImageSet(drawn.data, broken, drawn.prepared), cache=tmp_path)
    assert shards(only_folder(tmp_path)) == ["000000000"]
    model.seen = 0
    found = run(model, drawn, cache=tmp_path)
    assert model.seen == COUNT - 64
    assert_same(found, run(model, drawn))


def test_half_a_shard_counts_as_missing(model: Counting, tmp_path: Path) -> None:
    images = image_set(examples(tmp_path / "photos", model.preprocess), model.preprocess, 2)
    whole = (tmp_path / "photos" / "4.png").read_bytes()
    (tmp_path / "photos" / "4.png").write_text("no picture")
    with pytest.raises(InputError, match=r"4\.png"):
        run(model, images, cache=tmp_path / "cache")
    assert shards(only_folder(tmp_path / "cache")) == []
    (tmp_path / "photos" / "4.png").write_bytes(whole)
    assert_same(run(model, images, cache=tmp_path / "cache"), run(model, images))


@pytest.mark.parametrize("name", ["cls.npy", "target.label.npy"])
def test_damaged_arrays_are_refused_by_name(model: Counting, drawn: ImageSet, tmp_path: Path, name: str) -> None:
    run(model, drawn, cache=tmp_path)
    path = only_folder(tmp_path) / name
    whole = path.read_bytes()
    for damage in (whole[:-1], b"", b"x" * len(whole), whole.replace(b"150", b"100", 1)):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=f"{name}: missing or damaged; delete the folder"):
            run(model, drawn, cache=tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=f"{name}: missing or damaged; delete the folder"):
        run(model, drawn, cache=tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 10**5, '{"grid": 3, "arrays": {}}', '{"grid": [1, 2], "arrays": {"../x": ["<f4", []]}}'],
)
def test_damaged_shard_files_are_refused_by_name(model: Counting, drawn: ImageSet, tmp_path: Path, text: str) -> None:
    run(model, drawn, cache=tmp_path)
    (only_folder(tmp_path) / "shards" / "000000128.json").write_text(text)
    with pytest.raises(InputError, match=r"000000128\.json: missing or damaged"):
        run(model, drawn, cache=tmp_path)


def test_pickled_arrays_are_never_loaded(model: Counting, drawn: ImageSet, tmp_path: Path) -> None:
    run(model, drawn, cache=tmp_path)
    path = only_folder(tmp_path) / "cls.npy"
    np.save(path, np.array([{"x": "y" * 10**5}] * COUNT, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"cls\.npy: missing or damaged"):
        run(model, drawn, cache=tmp_path)


def test_features_beyond_float16_and_not_finite_ones_name_the_images(drawn: ImageSet, tmp_path: Path) -> None:
    model = VisionTransformer(CONFIG).eval()
    half = Wanted(dtype=torch.float16)
    with torch.no_grad():
        model.norm.bias.fill_(70000.0)
    with pytest.raises(InputError, match=r"images 0 to 63: cls up to 7e\+04, float16 ends at 65504; use float32"):
        run(model, drawn, half, tmp_path)
    assert shards(only_folder(tmp_path)) == []
    run(model, drawn, Wanted(), tmp_path)
    with torch.no_grad():
        model.norm.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="images 0 to 63: cls of the model are not finite numbers"):
        run(model, drawn, Wanted())


def test_wishes_that_cannot_be_met_are_refused_before_the_model_runs(model: Counting, drawn: ImageSet) -> None:
    with pytest.raises(InputError, match="tokens patch; give some of cls, registers, patches, mean_patch"):
        run(model, drawn, Wanted(parts=("patch",)))
    with pytest.raises(InputError, match="layer 2 of a model with 2 blocks"):
        run(model, drawn, Wanted(layers=(2,)))
    bare = VisionTransformer(CONFIG.model_copy(update={"class_token": False, "pool": "avg"})).eval()
    with pytest.raises(InputError, match="no class token, which the task reads"):
        run(bare, drawn, Wanted())
    assert run(bare, drawn, all_tokens(bare)).features.cls is None
    assert model.seen == 0


def test_parts_of_a_set_are_those_of_the_whole(model: Counting, tmp_path: Path) -> None:
    drawn = scenes(model.preprocess, 150, 0, "train")
    files = photos(tmp_path / "photos", model.preprocess)
    for images, (start, stop) in (
        (drawn, (64, 150)),
        (drawn, (70, 140)),
        (drawn, (3, 5)),
        (files, (1, 5)),
        (files, (3, 9)),
    ):
        whole = torch.cat([batch.images for batch in images.batches()])
        assert torch.equal(torch.cat([batch.images for batch in images.batches(start, stop)]), whole[start:stop])
    labels = torch.cat([batch.targets["label"] for batch in drawn.batches()])
    assert torch.equal(torch.cat([batch.targets["label"] for batch in drawn.batches(70, 140)]), labels[70:140])


def examples(folder: Path, preprocess: Preprocess) -> Examples:
    photos(folder, preprocess)
    paths = sorted(folder.iterdir())
    return Examples(
        data=DataRecord(name="made", split="val", n=5, hash="x"),
        classes=("a", "b"),
        labels=torch.tensor([0, 1, 1, 0, 1]),
        read=lambda index: read_image(paths[index]),
        names=[path.name for path in paths],
    )


def test_examples_become_batches_in_order(model: Counting, tmp_path: Path) -> None:
    made = examples(tmp_path / "photos", model.preprocess)
    batches = list(image_set(made, model.preprocess, 2).batches())
    assert [len(batch.images) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch.targets["label"] for batch in batches]).tolist() == [0, 1, 1, 0, 1]
    expected = torch.stack([model.preprocess(made.read(index)) for index in range(5)])
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)


def test_the_first_unreadable_image_is_named(model: Counting, tmp_path: Path) -> None:
    made = image_set(examples(tmp_path / "photos", model.preprocess), model.preprocess, 2)
    for index in (3, 4):
        (tmp_path / "photos" / f"{index}.png").write_text("no picture")
    with pytest.raises(InputError, match=r"3\.png: not a readable image"):
        run(model, made, Wanted())


def test_what_cannot_be_read_may_be_left_out(model: Counting, tmp_path: Path) -> None:
    photos(tmp_path / "class", model.preprocess)
    (tmp_path / "class" / "1.png").write_text("no picture")
    found = run(model, readable_sample(model.preprocess, tmp_path, "", 2, 10), Wanted())
    assert len(found) == len(found.targets["label"]) == 4
    for path in (tmp_path / "class").iterdir():
        path.write_text("no picture")
    with pytest.raises(InputError, match="0 images to read"):
        run(model, readable_sample(model.preprocess, tmp_path, "", 2, 10), Wanted())


def test_threads_keep_the_order_and_stay_within_bounds() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(30):
            taken.append(number)
            yield number

    def slow(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    before = torch.get_num_threads()
    for given, result in enumerate(in_order(slow, items(), threads=4, ahead=5)):
        assert result == given * given
        assert len(taken) <= given + 6
    assert taken == list(range(30))
    assert torch.get_num_threads() == before
    assert list(ahead(iter("abc"), 2)) == ["a", "b", "c"]
    assert list(ahead(iter(()), 2)) == []


def test_an_error_comes_in_its_turn() -> None:
    def fail(number: int) -> int:
        if number == 3:
            raise InputError("three")
        return number

    found = in_order(fail, range(10), threads=4, ahead=6)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="three"):
        next(found)


class Slow(Counting):
    """Takes its time."""

    pause = 0.0

    def intermediate(self, images: Tensor, *args: object, **kwargs: object) -> list[Features]:
        time.sleep(self.pause)
        return super().intermediate(images, *args, **kwargs)


class Child:
    """The same extraction in a process of its own."""

    def __init__(
        self, cache: Path, *, pause: float = 0.0, largest: int | None = None, environment: dict[str, str] | None = None
    ) -> None:
        """Start it; no file may become larger than `largest` bytes."""
        context = get_context("fork")  # a new interpreter would import torch for seconds
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=self.work, args=(sender, cache, pause, largest, environment or {}))
        self.process.start()
        sender.close()

    @staticmethod
    def work(sender: Connection, cache: Path, pause: float, largest: int | None, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        PartialState._reset_state()  # which other tests may have set up before the fork
        torch.manual_seed(0)
        model = Slow(CONFIG).eval()
        model.pause = pause
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        try:
            found = run(model, scenes(model.preprocess, COUNT, 0, "test"), cache=cache)
        except InputError as error:
            sender.send(str(error))
        else:
            sender.send((model.seen, float(found.parts["patches"].double().sum())))

    def result(self) -> tuple[int, float] | str:
        """Images run and sum of the patches, or the line of an error."""
        found = self.receiver.recv()
        self.process.join()
        return found


def total(drawn: ImageSet) -> float:
    """Sum of the patches, computed here."""
    torch.manual_seed(0)
    return float(run(Slow(CONFIG).eval(), drawn).parts["patches"].double().sum())


def test_a_killed_extraction_goes_on(drawn: ImageSet, tmp_path: Path) -> None:
    killed = Child(tmp_path, pause=0.5)
    while not list(tmp_path.glob("*/shards/*.json")):
        time.sleep(0.01)
        assert killed.process.is_alive()
    killed.process.kill()
    killed.process.join()
    assert killed.process.exitcode == -signal.SIGKILL
    assert shards(only_folder(tmp_path)) == ["000000000"]
    assert Child(tmp_path).result() == (COUNT - 64, total(drawn))


def test_a_full_disk_is_one_line_and_the_shards_stay(drawn: ImageSet, tmp_path: Path) -> None:
    one_and_a_half = 100 * 2 * 16 * 24 * 4  # bytes of the patches of 100 images
    line = Child(tmp_path, largest=one_and_a_half).result()
    assert line == (
        f"{only_folder(tmp_path)}: cannot be written at image 64 of 150 (File too large); finished shards stay: "
        "make room, or give another folder"
    )
    assert shards(only_folder(tmp_path)) == ["000000000"]
    assert Child(tmp_path).result() == (COUNT - 64, total(drawn))


def test_two_commands_at_once_leave_a_whole_cache(drawn: ImageSet, tmp_path: Path) -> None:
    both = [Child(tmp_path, pause=0.1) for _ in range(2)]
    assert {one.result()[1] for one in both} == {total(drawn)}
    assert Child(tmp_path).result() == (0, total(drawn))


def test_two_processes_share_the_shards(drawn: ImageSet, tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    address["OMP_NUM_THREADS"] = "1"  # as launchers set it; accelerate warns where nobody does
    both = [Child(tmp_path, environment=address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    assert [one.result() for one in both] == [(64 + COUNT - 128, total(drawn)), (64, total(drawn))]


def test_processes_that_do_not_meet_are_refused(tmp_path: Path) -> None:
    environment = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": "0"}
    line = Child(tmp_path, environment=environment).result()
    assert isinstance(line, str)
    assert line.startswith("WORLD_SIZE=2, but the processes do not meet (")
    assert line.endswith("); start them with accelerate launch")
