import json
import subprocess
import sys
from pathlib import Path

import pytest
from vitreg_core import VisionTransformer, ViTConfig, save_model
from vitreg_eval.cli import main
from vitreg_eval.config.datasets import DATASETS
from vitreg_eval.task import TASKS
from vitreg_eval.tasks import norms

FIELDS = {"task", "model", "data", "settings", "metrics", "notes", "versions", "seed", "commit", "seconds"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a small model."""
    config = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    save_model(VisionTransformer(config), tmp_path / "model")
    return tmp_path / "model"


def run(line: str) -> None:
    main(line.split())


def test_a_task_prints_a_table_and_writes_everything(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(f"knn --model {source} --out {out} --train_images 64 --test_images 32 --k 5 --device cpu --seed 3")
    result = json.loads((out / "result.json").read_text())
    assert set(result) == FIELDS
    assert result["metrics"]["top1"]["n"] == result["data"]["n"] == 32
    assert len(result["model"]["hash"]) == 64
    assert (result["seed"], result["settings"]["k"]) == (3, [5])
    printed = capsys.readouterr().out
    assert "95 % interval" in printed
    assert str(out / "result.json") in printed


def test_several_models_get_a_folder_each(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(f"norms --model {source} --model {source} --out {out} --test_images 16")
    results = [json.loads((out / name / "result.json").read_text()) for name in ("0_model", "1_model")]
    assert results[0]["metrics"] == results[1]["metrics"]


BAD = {
    "task": ("lsot", "unknown task 'lsot'; did you mean lost"),
    "command": ("compair a b", "unknown task 'compair'; did you mean compare"),
    "no model": ("knn", "missing: --model SOURCE"),
    "nothing": (
        "lost --dataset voc07",
        "missing: --model SOURCE, a model or run folder, a weights file or a preset and --data DIR",
    ),
    "device": ("knn --model {source} --out {out} --device mps", "--device mps: there is none; give --device cpu"),
    "seed": ("knn --model {source} --seed 99999999999", "seed='99999999999': Input should be less than"),
    "lost data": ("lost --model {source} --data {source}", "with --dataset scenes; give --dataset voc07"),
    "lost both": ("lost --model {source} --images x --dataset voc07", "give one of them"),
    "relation": ("knn --model {source} --data x --label relation", "only scenes have relations"),
    "limit": ("norms --model {source} --limit 3", "--limit 3 without --images"),
    "layer": ("lost --model {source} --layer 7 --test_images 2 --out {out}", "layer 7 of a model with 2 blocks"),
    "second model": ("knn --model {source} --model nowhere --out {out}", "model source 'nowhere'"),
    "option": ("knn --modle x", "unknown option --modle; did you mean model"),
    "value": ("norms --model x --test_images 0", "test_images='0': Input should be greater than 0"),
    "choice": ("lost --model x --dataset voc", "dataset='voc'"),
    "source": ("knn --model nowhere --out {out}", "model source 'nowhere': no such file or folder"),
    "preset": ("knn --model vit_s16_rg4 --out {out}", "did you mean vit_s16_reg4"),
    "images": ("doctor --model {source} --images {out}/none --out {out}", "no such folder; give a folder"),
    "no images": ("doctor --model {source} --images {source} --out {out}", "0 images found"),
    "data": (
        "lost --dataset voc07 --model {source} --out {out}",
        "missing: --data DIR, the folder that holds VOCdevkit",
    ),
    "out": ("knn --model {source} --out {source}/config.json", "cannot be made"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_and_code_2(
    case: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITREG_DATA", raising=False)
    line, advice = BAD[case]
    with pytest.raises(SystemExit) as ended:
        run(line.format(source=source, out=tmp_path / "out"))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("vitreg-eval: error: ")
    assert error.count("\n") == 1
    assert advice in error
    assert not list((tmp_path / "out").rglob("result.json"))


@pytest.mark.parametrize("line", ["", "--help", "list"])
def test_help_names_every_task(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(line)
    printed = capsys.readouterr().out
    assert all(name in printed for name in TASKS)


def test_list_names_data_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    run("list")
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*DATASETS, "voc07", "ade20k", "nyu", "dinov2_vitb14_reg4", "vit_s16_reg4"])


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    run("--help")
    printed = capsys.readouterr().out
    assert all(f"vitreg-eval {name}" in printed for name in ("compare", "paper", "list", "--version"))
    for name in ("compare", "paper"):
        with pytest.raises(SystemExit) as ended:
            run(f"{name} --help")
        assert ended.value.code == 0


def test_an_interrupt_ends_with_one_line_and_code_130(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(norms, "run", interrupt)
    with pytest.raises(SystemExit) as ended:
        run(f"norms --model {source} --out {tmp_path / 'out'} --test_images 8")
    assert ended.value.code == 130
    error = capsys.readouterr().err
    assert error.startswith("vitreg-eval: interrupted")
    assert error.count("\n") == 1


def test_of_several_processes_the_first_prints_and_writes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("1", "0"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        run(f"norms --model {source} --out {tmp_path / rank} --test_images 8 --device cpu")
    assert not (tmp_path / "1").exists()
    assert (tmp_path / "0" / "result.json").is_file()
    printed = capsys.readouterr().out
    assert printed.count("95 % interval") == 1
    assert "result in" in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    run("--version")
    assert capsys.readouterr().out == "vitreg-eval 0.1.0\n"


@pytest.mark.parametrize("words", [["--help"], ["compare"], ["paper"], ["knn"]])
def test_what_computes_nothing_imports_no_torch(words: list[str]) -> None:
    code = f"""
import sys
from vitreg_eval.cli import main
try:
    main({words})
except SystemExit:
    pass
print('torch' in sys.modules)
"""
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.endswith("False\n")


def test_the_list_names_tasks_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    said = capsys.readouterr().out
    assert "labelled data (knn linear logreg" in said
    assert "  dtd           dtd: images" in said
    assert "voc07 voc12 coco20k" in said
