import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vitreg_core import VisionTransformer, ViTConfig, save_model
from vitreg_eval import paper
from vitreg_eval.cli import main
from vitreg_eval.published import PAPER_TABLES, TOKEN_SETS
from vitreg_eval.results import Result

TEXT = "papers/registers_paper.txt"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two of the data sets of table 1, as class folders."""
    generator = np.random.default_rng(0)
    for dataset in ("cifar10", "pets"):
        for split, count in (("train", 40), ("test", 12)):
            for index in range(count):
                folder = tmp_path / "data" / dataset / split / f"class{index % 2}"
                folder.mkdir(parents=True, exist_ok=True)
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8) // (1 + index % 2)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "data"


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Folders of two small models."""
    for index in range(2):
        torch.manual_seed(index)
        config = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, registers=index)
        save_model(VisionTransformer(config), tmp_path / f"m{index}")
    return [str(tmp_path / f"m{index}") for index in range(2)]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where something was measured, in order."""
    places: list[str] = []
    real = paper.measure_model

    def measure_model(*arguments: object) -> Result:
        places.append("/".join(Path(str(arguments[-1])).parts[-2:]))
        return real(*arguments)

    monkeypatch.setattr(paper, "measure_model", measure_model)
    return places


def run(table: str, sources: list[str], data: Path, out: Path, *more: str) -> None:
    models = [word for source in sources for word in ("--model", source)]
    main(["paper", table, *models, "--data", str(data), "--out", str(out), "--device", "cpu", *more])


EVERYTHING = ["0_m0/tokens_cifar10", "0_m0/tokens_pets", "1_m1/tokens_cifar10", "1_m1/tokens_pets"]


def test_a_table_holds_ours_the_published_and_what_is_missing(
    sources: list[str], data: Path, tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run("table1", sources, data, tmp_path / "out")
    assert measured == EVERYTHING
    text = (tmp_path / "out" / "table.md").read_text()
    assert "paper: DINOv2 ViT-g/14, outlier token (other weights)" in text
    assert "0.993 (other data (12 images))" in text
    assert text.count("no imagenet-1k there") == 1
    assert text.strip() in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    ours = [row for row in rows if row["published"] == "no"]
    assert len(ours) == 2 * 3 * 14
    assert [row["n"] for row in ours if row["value"] and row["kind"] == "cls"] == ["12"] * 4
    record = json.loads((tmp_path / "out" / "table.json").read_text())
    assert len(record["published"]) == 3 * 14
    assert {one["missing"] == "" for one in record["ours"] if one["dataset"] == "pets"} == {True}
    assert "other data" in (tmp_path / "out" / "table.html").read_text()


def test_what_is_done_is_kept_and_a_kill_costs_one_measurement(
    sources: list[str], data: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = paper.measure_model

    def killed(*arguments: object) -> Result:
        if len(done()) == 3:
            raise KeyboardInterrupt
        return counted(*arguments)

    def done() -> list[Path]:
        return list((tmp_path / "out").rglob("result.json"))

    monkeypatch.setattr(paper, "measure_model", killed)
    with pytest.raises(SystemExit) as ended:
        run("table1", sources, data, tmp_path / "out")
    assert ended.value.code == 130
    assert len(done()) == 3
    monkeypatch.setattr(paper, "measure_model", counted)
    measured.clear()
    run("table1", sources, data, tmp_path / "out")
    assert measured == EVERYTHING[3:]


@pytest.mark.parametrize("change", ["nothing", "batch", "data", "weights", "settings", "damage"])
def test_another_model_data_or_setting_is_measured_again(
    change: str, sources: list[str], data: Path, tmp_path: Path, measured: list[str]
) -> None:
    run("table1", sources[:1], data, tmp_path / "out")
    measured.clear()
    more = {"settings": ["--precision", "fp32-fast"], "batch": ["--batch_size", "7"]}.get(change, [])
    if change == "data":
        (data / "pets/test/class0/0.png").unlink()
    if change == "weights":
        torch.manual_seed(9)
        config = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
        save_model(VisionTransformer(config), sources[0])
    if change == "damage":
        (tmp_path / "out/0_m0/tokens_pets/result.json").write_text("{")
    run("table1", sources[:1], data, tmp_path / "out", *more)
    again = {"nothing": [], "batch": [], "data": ["pets"], "damage": ["pets"]}.get(change, ["cifar10", "pets"])
    assert measured == [f"0_m0/tokens_{name}" for name in again]


def test_zero_shot_classification_needs_a_text_tower(
    sources: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("table2b", sources[:1], data, tmp_path / "out")
    assert "give a dual encoder" in capsys.readouterr().err


def test_options_reach_the_tasks(sources: list[str], data: Path, tmp_path: Path) -> None:
    (data / "pets").rename(data / "imagenet-1k")
    (data / "imagenet-1k/test").rename(data / "imagenet-1k/val")
    run("table2a", sources[:1], data, tmp_path / "out", "--protocol", "cached", "--steps", "2")
    found = json.loads((tmp_path / "out/0_m0/linear_imagenet-1k/result.json").read_text())
    assert (found["settings"]["protocol"], found["settings"]["steps"]) == ("cached", 2)
    text = (tmp_path / "out" / "table.md").read_text()
    assert "other data (12 images), other protocol" in text
    assert "chosen on the data it is reported on" in text


def write_dense(data: Path) -> None:
    """ADE20k and NYUd, as small as can be, in their layouts."""
    generator = np.random.default_rng(0)
    for split, count in (("training", 3), ("validation", 2)):
        for kind in ("images", "annotations"):
            (data / "ADEChallengeData2016" / kind / split).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            name = f"ADE_{'train' if split == 'training' else 'val'}_{index:08}"
            Image.fromarray(pixels).save(data / "ADEChallengeData2016/images" / split / f"{name}.jpg")
            mask = (pixels[:, :, 0] % 4 + 1).astype(np.uint8)
            Image.fromarray(mask).save(data / "ADEChallengeData2016/annotations" / split / f"{name}.png")
    for split, count in (("train", 3), ("test", 2)):
        lines = []
        for index in range(count):
            (data / "nyu_depth_v2" / split).mkdir(parents=True, exist_ok=True)
            rgb, depth = (f"{split}/{kind}_{index:05}" for kind in ("rgb", "sync_depth"))
            pixels = generator.integers(0, 256, (480, 640, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / "nyu_depth_v2" / f"{rgb}.jpg")
            metres = generator.integers(1000, 9000, (480, 640)).astype(np.uint16)
            Image.fromarray(metres).save(data / "nyu_depth_v2" / f"{depth}.png")
            lines.append(f"{rgb}.jpg {depth}.png 518.8579")
        (data / "nyu_depth_v2" / f"nyu_{split}.txt").write_text("\n".join(lines) + "\n")


def test_trained_heads_are_kept_too_and_learn_from_batches_of_the_protocol(
    data: Path, tmp_path: Path, measured: list[str]
) -> None:
    save_model(VisionTransformer(ViTConfig(image_size=64, patch_size=32, embed_dim=12, depth=1)), tmp_path / "m0")
    (data / "pets").rename(data / "imagenet-1k")
    (data / "imagenet-1k/test").rename(data / "imagenet-1k/val")
    write_dense(data)
    for _ in range(2):
        run("table2a", [str(tmp_path / "m0")], data, tmp_path / "out", "--protocol", "cached", "--steps", "1")
    assert measured == ["0_m0/linear_imagenet-1k", "0_m0/segment_ade20k", "0_m0/depth_nyu"]
    found = json.loads((tmp_path / "out/0_m0/segment_ade20k/result.json").read_text())
    assert found["settings"]["batch_size"] == 16


BAD = {
    "table": (["paper", "table9"], "unknown figure or table 'table9'; did you mean table"),
    "figure": (["paper", "fig77", "--model", "vit_ti16"], "unknown figure or table 'fig77'; did you mean fig7?"),
    "nothing": (["paper"], "missing: the figure or table, one of fig1, fig2, fig3, fig4a,"),
    "no model": (["paper", "table1"], "missing: --model SOURCE and --data DIR, the folder that holds the data sets"),
    "no photos": (["paper", "fig3", "--model", "vit_ti16", "--limit", "5"], "--limit 5 without --images; for scenes"),
    "data": (["paper", "table1", "--model", "vit_ti16", "--data", "nowhere"], "nowhere: no such folder"),
    "model": (["paper", "table1", "--model", "nowhere", "--data", "."], "model source 'nowhere'"),
    "second": (["paper", "table1", "--model", "vit_ti16", "--model", "nowhere", "--data", "."], "source 'nowhere'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITREG_DATA", raising=False)
    words, advice = BAD[case]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert advice in capsys.readouterr().err


def numbers(line: str) -> list[str]:
    """Digits of the numbers of a line, which a scan may have robbed of their points."""
    return [word.replace(".", "") for word in re.findall(r"[\d.]+", line)]


def test_published_values_are_those_of_the_paper(shared_data: Path) -> None:
    text = (shared_data.parent / "reference" / TEXT).read_text().splitlines()
    for kind, row in zip(("[CLS]", "normal ", "outlier "), PAPER_TABLES["table1"].rows.values(), strict=True):
        line = next(line for line in text if line.startswith(kind))
        assert numbers(line.removeprefix(kind)) == [f"{value * 100:.1f}".replace(".", "") for value in row]


def test_published_values_are_those_of_the_study(shared_data: Path) -> None:
    text = (shared_data.parent / "reference" / "papers" / "small_vits_reproduction.txt").read_text()
    for model, (value,) in PAPER_TABLES["study_table1"].rows.items():
        assert value is not None
        count = re.search(r"\+ (\d+) reg", model)
        first = model.split(" + ")[0]
        names = {"DINOv2 L/14": "DINOv2 (large)", "DINOv2 S/14": "DINOv2 (small)", "DINO": "DINO"}
        name = names.get(first, f"DeiT-III ({count[1] if count else 2} regs)")
        [cells] = [cells for cells in (line.split("\t") for line in text.splitlines()) if cells[0] == name]
        assert f"{100 * value:.2f}" == cells[2 if count else 1]
    rows = PAPER_TABLES["study_table2"].rows
    means = re.findall(r"(?<!pm)(?<!pm )(?<!± )(?<!\d)\.\d{4}", text[text.index("Table 4:") : text.index("Table 5:")])
    printed = {1.0, *map(float, means)}
    assert {value for values in rows.values() for value in values if value is not None} == printed
    for part, values in (
        ("low norm", (0.7161, 0.7534, 0.9462, 0.1966)),
        ("high norm", (0.854, 0.7853, 0.9568, 0.5608)),
    ):
        assert rows[f"DeiT-III S/16, {part}"] == values


def test_a_published_row_may_have_gaps() -> None:
    plan = PAPER_TABLES["study_table2"]
    rows = [paper.Row("ours", "cls", [paper.Measured(column, None, "not there") for column in plan.columns])]
    [line] = [line for line in paper.markdown(plan, rows).splitlines() if "DINOv2 S/14, class token" in line]
    assert line == "| study: DINOv2 S/14, class token (other weights) | 0.9994 | - (not given) | 1 | - (not given) |"
    found = list(csv.DictReader(paper.comma_separated(plan, rows).splitlines()))
    gaps = [row["column"] for row in found if row["published"] == "yes" and not row["value"]]
    assert gaps == ["CIFAR-10", "Flowers"] * 2


def test_tables_are_whole() -> None:
    for table in PAPER_TABLES.values():
        assert all(len(values) == len(table.columns) for values in table.rows.values())
    assert len({name for _, name, _ in TOKEN_SETS}) == 14
