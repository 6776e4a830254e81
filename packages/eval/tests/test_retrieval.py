"""Image-text retrieval against brute force, and encoders whose answers are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import hypergeom
from torch import nn
from torch.nn import functional as F
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import Preprocess
from vitreg_core.errors import InputError
from vitreg_eval import dual
from vitreg_eval.cli import main
from vitreg_eval.datasets.captions import open_captions
from vitreg_eval.dual import Dual
from vitreg_eval.results import Result, read_result
from vitreg_eval.tasks import retrieval


class Planted(nn.Module):
    """Places an image at the number that its brightness is, a text at the number that it names, both one-hot."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.eye(13))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.places[(images.mean(dim=(1, 2, 3)) * 255 / 20).round().long()]

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.places[tokens[:, 0]]


def tokenize(lines: list[str]) -> torch.Tensor:
    return torch.tensor([[int("".join(filter(str.isdecimal, line)) or 0) % 13] for line in lines])


def planted(source: str = "planted") -> Dual:
    pixels = PreprocessConfig(image_size=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    found = Dual(Planted(), Preprocess(pixels), tokenize).eval()
    found.source = source
    return found


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images whose brightness is 20 times their number."""
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (number * 20,) * 3).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def table(folder: Path, rows: list[tuple[str, str]], name: str = "pairs.csv", mark: str = "\t") -> Path:
    lines = [mark.join(row) for row in [("filepath", "title"), *rows]]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def run(line: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setattr(dual, "open_model", planted)
    main([*line.split(), "--model", "x", "--out", str(out), "--device", "cpu"])
    return read_result(out)


def made(images: int, texts: int, *, ties: object = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(images)
    owners = torch.cat([torch.arange(images), torch.randint(0, images, (texts - images,), generator=generator)])
    owners = owners[torch.randperm(texts, generator=generator)]
    if ties:  # whole numbers, exact in float32
        return (
            torch.randint(-1, 2, (images, 4), generator=generator).float(),
            torch.randint(-1, 2, (texts, 4), generator=generator).float(),
            owners,
        )
    places = torch.randn(images, 16, generator=generator)
    noise = torch.randn(texts, 16, generator=generator)
    return F.normalize(places, dim=-1), F.normalize(places[owners] + 1.5 * noise, dim=-1), owners


@pytest.mark.parametrize("rows", [3, 512])
@pytest.mark.parametrize("ties", [False, True])
def test_recall_is_that_of_brute_force(ties: object, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "ROWS", rows)
    images, texts, owners = made(40, 130, ties=ties)
    found = retrieval.evaluate(images, texts, owners, 0)
    near, own = images.numpy() @ texts.numpy().T, owners.numpy()
    for k in (1, 5, 10):
        first = np.argsort(-near, axis=1, kind="stable")[:, :k]
        of_images = np.mean([(own[row] == image).any() for image, row in enumerate(first)])
        first = np.argsort(-near.T, axis=1, kind="stable")[:, :k]
        of_texts = np.mean([own[text] in row for text, row in enumerate(first)])
        assert found[f"image_to_text_r{k}"].value == pytest.approx(of_images)
        assert found[f"text_to_image_r{k}"].value == pytest.approx(of_texts)
    assert {metric.n for metric in found.values()} == {40}


def test_chance_is_that_of_drawing_without_replacement() -> None:
    own = torch.tensor([1, 5, 2, 4])
    for k in (1, 5, 10):
        expected = np.mean([1 - hypergeom(12, mine, k).pmf(0) for mine in own.tolist()])
        assert retrieval.text_chance(own, k) == pytest.approx(expected)


def test_recall_of_encoders_without_knowledge_is_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 64, generator=generator), dim=-1) for n in (1000, 3000))
    found = retrieval.evaluate(images, texts, torch.arange(3000) % 1000, 0)
    for metric in found.values():
        chance = float(metric.note.split()[1])
        assert abs(metric.value - chance) < 5 * (chance / 1000) ** 0.5


def test_a_planted_encoder_gets_the_known_scores(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"photos/{n}.png", f"the number {n}") for n in range(12)]
    rows += [("photos/../photos/3.png", "wrong: 4"), ("photos/5.png", "  ")]
    file = table(tmp_path, rows)
    found = run(f"retrieval --data {file}", tmp_path / "out", monkeypatch)
    assert found.metrics["image_to_text_r1"].value == 1
    assert found.metrics["text_to_image_r1"].value == pytest.approx(12 / 13)
    assert found.metrics["text_to_image_r5"].value == 1  # of images equally far the first ones stand first
    assert "chance 0.0833 among 12 images" in found.metrics["text_to_image_r1"].note
    assert (found.data.name, found.data.split, found.data.n) == (tmp_path.name, "pairs", 12)
    assert any("13 captions of 12 images" in note for note in found.notes)
    assert "1 empty captions were left out" in found.notes


def test_features_are_kept(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = table(tmp_path, [(f"photos/{n}.png", f"{n}, a number") for n in range(3)], mark="\t")
    line = f"retrieval --data {file} --cache {tmp_path / 'cache'}"
    first = run(line, tmp_path / "one", monkeypatch)
    for path in photos.iterdir():
        path.write_bytes(b"x" * path.stat().st_size)
    assert run(line, tmp_path / "two", monkeypatch).metrics == first.metrics
    assert set(first.metrics) == {"image_to_text_r1", "text_to_image_r1"}


def test_tables_may_have_commas_and_more_columns(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_bytes('\ufefftitle,url,filepath\r\n"a cat, alone",x,photos/1.png\r\nb,y,photos/2.png\r\n'.encode())
    found = open_captions(file)
    assert found.texts == ("a cat, alone", "b")
    assert [path.name for path in found.paths] == ["1.png", "2.png"]


def test_annotations_of_coco_are_read(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    photos.rename(tmp_path / "val2017")
    file = tmp_path / "annotations" / "captions_val2017.json"
    content = {
        "images": [{"id": 70 + n, "file_name": f"{n}.png"} for n in range(12)],
        "annotations": [{"id": n, "image_id": 70 + n % 3, "caption": f" caption\n{n}"} for n in range(6)],
    }
    file.write_text(json.dumps(content))
    found = open_captions(file)
    assert [path.name for path in found.paths] == ["0.png", "1.png", "2.png"]
    assert (found.texts[5], found.owners.tolist()) == ("caption 5", [0, 1, 2, 0, 1, 2])
    assert open_captions(file, tmp_path / "val2017").data == found.data
    content["annotations"][0]["caption"] = "another"
    file.write_text(json.dumps(content))
    assert open_captions(file).data.hash != found.data.hash


@pytest.mark.real_data
def test_the_table_and_the_annotations_of_coco_agree(shared_data: Path) -> None:
    of_table = open_captions(shared_data / "captions" / "val.csv")
    of_coco = open_captions(shared_data / "coco" / "annotations" / "captions_val2017.json")
    assert (len(of_table.paths), len(of_table.texts)) == (79, 395)
    pairs = [
        {(one.paths[owner].name, text) for owner, text in zip(one.owners.tolist(), one.texts, strict=True)}
        for one in (of_table, of_coco)
    ]
    assert pairs[0] == pairs[1]
    train = open_captions(shared_data / "captions" / "train.csv")
    assert not {path.name for path in train.paths} & {path.name for path in of_table.paths}


def test_shared_captions_are_told(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = table(tmp_path, [("photos/1.png", "Two 2"), ("photos/2.png", "two 2"), ("photos/3.png", "3")])
    found = run(f"retrieval --data {file}", tmp_path / "out", monkeypatch)
    assert any("1 captions are those of several images" in note for note in found.notes)


WRONG = {
    "no column": ("filepath\tcaption\nphotos/1.png\tx\n", "no column title in its header 'filepath\\tcaption'"),
    "short row": ("filepath\ttitle\nphotos/1.png\n", "line 2 has other columns than the header; mend it"),
    "long row": ("filepath\ttitle\nphotos/1.png\tx\ty\n", "line 2 has other columns than the header; mend it"),
    "no image": ("filepath\ttitle\nphotos/99.png\tx\n", "line 2: there is no {folder}/photos/99.png"),
    "null": ("filepath\ttitle\nphotos/1.png\0\tx\n", "line 2: there is no"),
    "quote": ('filepath,title\nphotos/1.png,"x\n', "cannot be read (unexpected end of data); mend it"),
    "no rows": ("filepath\ttitle\n", "no caption in it; give a list with images and captions"),
    "empty": ("", "no column filepath in its header"),
    "blank": ("filepath\ttitle\nphotos/1.png\t \n", "no caption in it"),
    "one image": ("filepath\ttitle\nphotos/1.png\tx\n", "captions of 1 image; give two images or more"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tables_are_refused(
    case: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, advice = WRONG[case]
    (tmp_path / "pairs.csv").write_text(content)
    with pytest.raises(SystemExit) as ended:
        run(f"retrieval --data {tmp_path / 'pairs.csv'}", tmp_path / "out", monkeypatch)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert advice.format(folder=tmp_path) in error
    assert error.count("\n") == 1


WRONG_JSON = {
    "no json": ("{", "no annotations of captions as COCO's"),
    "a list": ("[]", "no annotations of captions as COCO's"),
    "boxes": ('{"images": [], "annotations": [{"bbox": []}]}', "KeyError: 'image_id'"),
    "stranger": ('{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "KeyError: 1"),
    "no images": (
        '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "x"}]}',
        "its images are not in",
    ),
}


@pytest.mark.parametrize("case", WRONG_JSON)
def test_wrong_annotations_are_refused(case: str, tmp_path: Path) -> None:
    content, advice = WRONG_JSON[case]
    (tmp_path / "captions_val2017.json").write_text(content)
    with pytest.raises(InputError) as found:
        open_captions(tmp_path / "captions_val2017.json")
    assert advice in str(found.value)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_bytes(b"filepath\ttitle\n\xff\xfe")
    with pytest.raises(InputError, match=r"not UTF-8 \(byte 15\); save it as UTF-8 text"):
        open_captions(tmp_path / "pairs.csv")
    with pytest.raises(InputError, match=r"none.csv: cannot be read .*give a table of filepath and title"):
        open_captions(tmp_path / "none.csv")
    with pytest.raises(InputError, match="a table says where its images are; leave it out"):
        open_captions(table(tmp_path, []), tmp_path)


def test_a_broken_image_is_named(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "1.png").write_bytes(b"no picture")
    file = table(tmp_path, [("photos/1.png", "1"), ("photos/2.png", "2")])
    with pytest.raises(SystemExit):
        run(f"retrieval --data {file}", tmp_path / "out", monkeypatch)


def test_no_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("retrieval", tmp_path / "out", monkeypatch)
    assert "missing: --data FILE, a table or COCO annotations of captions" in capsys.readouterr().err
