"""Images with captions in every layout, and in every state that disks leave them in."""

import io
import json
import os
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from vitreg_core.config import override
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError
from vitreg_recipes import find, train
from vitreg_recipes.augment import seeded
from vitreg_recipes.contrast.captions import Captioned, braces, open_captions
from vitreg_recipes.contrast.config import ContrastConfig
from vitreg_recipes.contrast.data import CaptionPairs, Pairs, make_tokenizer, open_pairs, training_crop
from vitreg_recipes.data import Share

CPU = torch.device("cpu")
ALONE = Share(size=4, process=0, processes=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def shared_data() -> Path:
    """Folder of the sample data sets: data/ below $VITREG_SHARED, or below ../shared."""
    folder = (Path(__file__).parents[3] / os.environ.get("VITREG_SHARED", "../shared") / "data").resolve()
    if not folder.is_dir():
        pytest.skip(f"no sample data at {folder}; set VITREG_SHARED to the folder that holds data/")
    return folder


def config_of(path: str, **changes: object) -> ContrastConfig:
    config = find("openclip_captions")
    assert isinstance(config, ContrastConfig)
    fixed = {"data.path": path, "data.batch_size": 4, "data.workers": 0, "model.image_size": 16}
    return override(config, fixed | {name.replace("__", "."): value for name, value in changes.items()})


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def caption(number: int) -> str:
    return f"picture number {number}"


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def sample(number: int) -> dict[str, bytes]:
    """Image and caption as files of a shard: a text, a JSON, or both in turn."""
    key = f"some.dir/{number:04}"
    entries = {"key": "x", "caption": caption(number) if number % 3 else "not this one", "alt": f"other {number}"}
    files = {f"{key}.{('jpg', 'PNG', 'webp')[number % 3]}": png(number)}
    files |= {f"{key}.json": json.dumps(entries).encode()} if number % 3 != 1 else {}
    return files | ({f"{key}.txt": f" {caption(number)}\n".encode()} if number % 3 != 2 else {})


def write_shards(folder: Path, *, count: int = 12, shards: int = 3) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        numbers = range(shard * count // shards, (shard + 1) * count // shards)
        write_tar(folder / f"{shard:05}.tar", {name: data for n in numbers for name, data in sample(n).items()})
    return str(folder / f"{{00000..{shards - 1:05}}}.tar")


def write_table(folder: Path, *, separator: str = "\t", count: int = 12, suffix: str = "csv") -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = [separator.join(("title", "filepath", "size"))]
    for number in range(count):
        picture(number).save(folder / "images" / f"{number}.png")
        lines.append(separator.join((f'"{caption(number)}"', f"images/{number}.png", "3")))
    (folder / f"list.{suffix}").write_text("\n".join(lines) + "\n")
    return folder / f"list.{suffix}"


def write_parquet(folder: Path, *, count: int = 12) -> str:
    datasets = pytest.importorskip("datasets")
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "image": [{"bytes": png(n), "path": None} for n in range(count)],
        "text": [caption(n) for n in range(count)],
    }
    table = datasets.Dataset.from_dict({**rows, "alt": [f"other {n}" for n in range(count)]})
    table.cast_column("image", datasets.Image()).to_parquet(str(folder / "0.parquet"))
    return str(folder / "*.parquet")


def check_all(source: Captioned, count: int = 12) -> None:
    assert len(source) == count
    assert source.dropped == 0
    for number in range(count):
        assert source.read(number).tobytes() == picture(number % 12).tobytes()
        assert source.caption(number) == caption(number % 12)


@pytest.mark.parametrize(("separator", "suffix"), [("\t", "csv"), ("\t", "tsv"), (",", "csv"), (";", "csv")])
def test_tables_are_read_whatever_separates_their_columns(tmp_path: Path, separator: str, suffix: str) -> None:
    check_all(open_captions(str(write_table(tmp_path, separator=separator, suffix=suffix)), None))


def test_shards_are_read_by_braces_patterns_and_folders(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "shards")
    check_all(open_captions(path, None))
    check_all(open_captions(str(tmp_path / "shards" / "*.tar"), None))
    check_all(open_captions(str(tmp_path / "shards"), None))
    assert open_captions(path, None).name(1).endswith("00000.tar/some.dir/0001.PNG")


def test_an_entry_of_the_json_can_be_the_caption(tmp_path: Path) -> None:
    source = open_captions(write_shards(tmp_path, count=12), "alt")
    assert [source.caption(index) for index in range(len(source))] == [f"other {n}" for n in range(12) if n % 3 != 1]
    assert source.dropped == 4


def test_parquet_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    path = write_parquet(tmp_path / "tables")
    check_all(open_captions(path, None))
    assert open_captions(path, "alt").caption(3) == "other 3"
    assert open_captions(path, None).name(2).endswith("row 2")


def test_sources_are_joined(tmp_path: Path) -> None:
    path = f"{write_table(tmp_path / 'a')}::{write_shards(tmp_path / 'b')}::{tmp_path / 'b'}"
    source = open_captions(path, None)
    check_all(source, 36)
    assert source.name(11).endswith("11.png")
    assert "00000.tar" in source.name(12)


def test_braces_count_and_list() -> None:
    assert list(braces("a/{08..11}-{x,y}.tar")) == [f"a/{n}-{s}.tar" for n in ("08", "09", "10", "11") for s in "xy"]
    assert list(braces("a.tar")) == ["a.tar"]


def batches(config: ContrastConfig, count: int, *, step: int = 0, share: Share = ALONE) -> list[Pairs]:
    return list(islice(open_pairs(config).batches(step, share, CPU), count))


def test_batches_follow_from_the_step_alone_whatever_the_workers(tmp_path: Path) -> None:
    path = write_shards(tmp_path, shards=1)  # fewer shards than workers, of which there are two below
    whole = batches(config_of(path), 5)
    late = batches(config_of(path, data__workers=2), 2, step=3)
    for one, other in zip(whole[3:], late, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)
    halves = [batches(config_of(path), 5, share=Share(2, rank, 2)) for rank in (0, 1)]
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([half[number].images for half in halves]), batch.images)
        assert torch.equal(torch.cat([half[number].tokens for half in halves]), batch.tokens)
    words = [open_clip.tokenize(caption(n), context_length=40)[0] for n in range(12)]
    seen = [tokens for batch in whole[:3] for tokens in batch.tokens]
    assert sorted(t.tolist() for t in seen) == sorted(t.tolist() for t in words)  # every pair once an epoch


def test_images_stay_with_their_captions(tmp_path: Path) -> None:
    config = config_of(str(write_table(tmp_path)))
    data = open_pairs(config)
    assert isinstance(data, CaptionPairs)
    means = torch.tensor([np.asarray(picture(n)).mean() for n in range(12)])
    batch = batches(override(config, {"data.crop_scale": (1.0, 1.0)}), 1)[0]
    for image, tokens in zip(batch.images, batch.tokens, strict=True):
        number = next(n for n in range(12) if torch.equal(open_clip.tokenize(caption(n), 40)[0], tokens))
        std, mean = (torch.tensor(v).view(3, 1, 1) for v in (data.preprocess.std, data.preprocess.mean))
        assert abs((image * std + mean).mean() * 255 - means[number]) < 3


def test_crops_are_open_clips(tmp_path: Path) -> None:
    theirs = open_clip.image_transform(16, is_train=True)
    data = open_pairs(config_of(str(write_table(tmp_path))))
    for seed in range(3):
        with seeded(seed):
            expected = theirs(picture(0))
        with seeded(seed):
            found = training_crop((0.9, 1.0), data.preprocess)(picture(0))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_scenes_come_with_their_captions() -> None:
    batch = batches(config_of("scenes", seed=3), 2)[1]
    scenes = draw_scenes(4, (3, 1, 0), image_size=16)
    assert torch.equal(batch.tokens, open_clip.tokenize(scenes.captions(), 40))
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    torch.testing.assert_close(batch.images, (scenes.image - mean) / std)


def test_a_caption_that_is_too_long_keeps_its_end_token() -> None:
    tokens = make_tokenizer(8)(["a " * 100, "a b"])
    assert tokens.shape == (2, 8)
    assert tokens[0, -1] == tokens[1].max() == 49_407
    assert torch.equal(tokens, open_clip.tokenize(["a " * 100, "a b"], context_length=8))


def test_samples_without_caption_or_image_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: data for n in range(8) for name, data in sample(n).items()}
    for name in ("some.dir/0001.txt", "some.dir/0005.webp"):
        del files[name]
    files |= {"some.dir/0004.txt": b" \n", "other/9.cls": b"3", "some.dir/0002.json": b'{"caption": ["a"]}'}
    write_tar(tmp_path / "0.tar", files)
    source = open_captions(str(tmp_path / "0.tar"), None)
    assert [source.caption(index) for index in range(len(source))] == [caption(n) for n in (0, 3, 6, 7)]
    assert source.dropped == 4
    batches(config_of(str(tmp_path / "0.tar")), 1)
    assert "4 of 8 samples lack a caption or an image, and are left out" in capsys.readouterr().err


def test_rows_without_caption_or_image_are_left_out(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    table.write_text(table.read_text() + "\n\timages/0.png\t1\nno file\t\t1\nshort\n")
    source = open_captions(str(table), None)
    assert (len(source), source.dropped) == (12, 3)


def test_broken_images_are_named_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "table")
    (tmp_path / "table/images/3.png").write_bytes(b"no image")
    (tmp_path / "table/images/5.png").unlink()
    files = {name: data for n in range(8) for name, data in sample(n).items()} | {"some.dir/0003.jpg": png(3)[:100]}
    write_tar(tmp_path / "0.tar", files)
    small = {"text__width": 8, "text__layers": 1, "model__embed_dim": 8, "model__depth": 1, "epochs": 1}
    config = config_of(f"{table}::{tmp_path / '0.tar'}", **small, optim__warmup_steps=0, out=str(tmp_path / "run"))
    train(config)
    told = capsys.readouterr().err
    for name in ("images/3.png", "images/5.png", "0.tar/some.dir/0003.jpg"):
        assert f"{name}: not a readable image, the next one takes its place" in told
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert last["skipped_images"] == 3


def test_too_many_broken_images_end_the_run(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    for number in range(8):
        (tmp_path / f"images/{number}.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"list.csv: \d+ of 12 images cannot be read, such as .*; mend or remove them"):
        batches(config_of(str(table)), 12)


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: str(d / "nothing.csv"), "0 files found"),
        (lambda d: str(d / "{0..2}.tar"), "0.tar: 0 files found"),
        (lambda d: str(d / "{3..2}.tar"), r"\{3..2\} is no range of at most 1000000 numbers; write"),
        (lambda d: str(d / "{0..99999999}.tar"), "is no range of at most 1000000 numbers"),
        (lambda d: str(d / "x.txt"), "no images with captions; give scenes, a table"),
        (lambda d: write(d / "a.csv", ""), "columns filepath and title not found among none"),
        (lambda d: write(d / "a.csv", "path,title\na,b\n"), "columns filepath and title not found among path, title"),
        (lambda d: write(d / "a.csv", "filepath,title\n"), "0 of 0 samples lack a caption or an image"),
        (lambda d: write(d / "a.csv", 'filepath\ttitle\na\t"b\n'), "cannot be read as a table"),
        (lambda d: write(d / "a.csv", "filepath\ttitle\na\t\nb\t \nc\td\n"), "2 of 3 samples lack a caption"),
        (lambda d: write(d / "a.tar", "no tar"), "not a whole, uncompressed tar"),
        (lambda d: str(write_table(d, count=3)), "3 images with captions for data.batch_size=4; give a smaller batch"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, make: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        open_pairs(config_of(make(tmp_path)))
    assert "\n" not in str(refused.value)


def test_a_table_without_the_named_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"columns filepath and alt not found among title, filepath, size; name them so"
    ):
        open_captions(str(write_table(tmp_path)), "alt")
    with pytest.raises(InputError, match=r"no column alt2 among image, text, alt; name that .* with data.text"):
        open_captions(write_parquet(tmp_path / "tables"), "alt2")


@pytest.mark.real_data
def test_the_sample_captions_are_whole(shared_data: Path) -> None:
    for name, count, photos in (("train", 1421, 284), ("val", 395, 79)):
        source = open_captions(str(shared_data / "captions" / f"{name}.csv"), None)
        assert (len(source), source.dropped) == (count, 0)
        assert len({source.name(index) for index in range(count)}) == photos
        source.read(count - 1)
