import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from vitreg_core import VisionTransformer, ViTConfig, create_model, model_cost, save_model
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.planted import plant_register_neurons
from vitreg_core.weights.files import weights_hash
from vitreg_eval.analyses.registers import plot_register_curves
from vitreg_eval.cli import main
from vitreg_eval.metrics import Metric

CONFIG = ViTConfig(
    image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, registers=4, num_classes=3, layer_scale=0.5
)
SMALL = "--train_images 96 --test_images 48 --k 5 --device cpu"


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    built = VisionTransformer(CONFIG).eval()
    for weights in (weights for weights in built.parameters() if weights.ndim > 1):
        torch.nn.init.normal_(weights, std=0.3)  # so that the class token depends on the registers
    return built


@pytest.fixture
def source(model: VisionTransformer, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


def read(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def run(line: str) -> None:
    main(line.split())


def test_each_count_gives_the_numbers_of_a_model_with_so_many_registers(
    source: Path, model: VisionTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(f"knn --model {source} --registers 0,1,4 --out {tmp_path / 'curve'} {SMALL}")
    printed = capsys.readouterr().out
    result = read(tmp_path / "curve")
    assert set(result["metrics"]) == {"top1_reg0", "top1_reg1", "top1_reg4"}
    assert result["settings"]["registers"] == [0, 1, 4]
    for count in (0, 1, 4):
        save_model(model.with_registers(count), tmp_path / "alone")
        run(f"knn --model {tmp_path / 'alone'} --out {tmp_path / 'expected'} {SMALL}")
        expected, one = read(tmp_path / "expected"), read(tmp_path / "curve" / f"reg{count}")
        assert result["metrics"][f"top1_reg{count}"] == one["metrics"]["top1"] == expected["metrics"]["top1"]
        assert expected["metrics"]["top1"]["ci95"] is not None
        assert one["model"]["hash"] == expected["model"]["hash"] == weights_hash(model.with_registers(count))
        assert one["settings"]["registers"] == [count]
        assert f"top1_reg{count}" in printed
    assert one["model"]["source"] == f"{source}, 4 registers"
    assert len({metric["value"] for metric in result["metrics"].values()}) > 1
    assert imread(tmp_path / "curve" / "registers.png").std() > 0


@pytest.mark.parametrize(
    "task", ["lost --test_images 4", "doctor --test_images 20", "segment --train_images 50 --steps 2"]
)
def test_every_task_draws_the_curve(task: str, source: Path, tmp_path: Path) -> None:
    small = "" if task.startswith(("lost", "doctor")) else "--test_images 8"
    run(f"{task} {small} --model {source} --registers 0 --registers 2 --out {tmp_path / 'out'} --device cpu")
    names = set(read(tmp_path / "out")["metrics"])
    assert names
    assert {name.rpartition("_")[2] for name in names} == {"reg0", "reg2"}
    assert read(tmp_path / "out" / "reg2")["metrics"]


@torch.no_grad()
def test_auto_measures_gain_and_cost(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clean = create_model("vit_ti8", image_size=64, depth=3, embed_dim=96, layer_scale=0.1, registers=2)
    clean.positions.patches.mul_(20)
    images = clean.preprocess.normalize(draw_scenes(96, seed=1).image)
    planted, _ = plant_register_neurons(clean.eval(), images, layer=1, share=0.002)
    save_model(planted, tmp_path / "planted")
    run(f"knn --model {tmp_path / 'planted'} --registers 0,2,auto --out {tmp_path / 'out'} {SMALL}")
    metrics = read(tmp_path / "out")["metrics"]
    assert {"top1_reg0", "top1_reg2", "top1_auto", "run_twice_auto", "relative_flops_auto"} == set(metrics)
    few, many = (model_cost(planted.with_registers(count).config).flops for count in (0, 2))
    share = metrics["run_twice_auto"]
    assert 0 < share["value"] < 1
    assert share["n"] == 96 + 48
    assert share["ci95"][0] < share["value"] < share["ci95"][1]
    assert metrics["relative_flops_auto"]["value"] == pytest.approx((few + share["value"] * many) / many)
    assert read(tmp_path / "out" / "auto")["model"]["hash"] == weights_hash(planted)


def test_auto_without_outliers_says_that_it_changes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(f"knn --model {source} --registers 0,auto --out {tmp_path / 'out'} {SMALL}")
    metrics = read(tmp_path / "out")["metrics"]
    assert metrics["top1_auto"] == metrics["top1_reg0"]
    assert metrics["run_twice_auto"]["value"] == 0
    assert "no image has outliers without registers" in capsys.readouterr().out


def test_curves_show_what_all_counts_have() -> None:
    metric = Metric(value=0.5, n=10, ci95=(0.4, 0.7))
    results = {"reg0": {"top1": metric, "cutoff": metric}, "reg8": {"top1": metric}, "auto": {"top1": metric}}
    (axes,) = plot_register_curves(results).axes
    assert axes.get_title() == "top1"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "8", "auto"]
    line, lone = axes.lines[0], axes.lines[3]
    assert list(line.get_ydata()) == [0.5, 0.5]
    assert list(lone.get_xdata()) == [2]
    (bars, *_) = [container[2][0].get_segments() for container in axes.containers]
    assert bars[0][:, 1].tolist() == pytest.approx([0.4, 0.7])


BAD = {
    "more": ("knn --model {source} --registers 0,5", "5 registers of a model with 4; use 0 to 4"),
    "word": ("knn --model {source} --registers 0,two", "give numbers of registers such as 0,1,2,4, or auto"),
    "negative": ("knn --model {source} --registers=-1", "give numbers of registers such as 0,1,2,4, or auto"),
    "auto": (
        "lost --model {source} --registers auto",
        "looks into single blocks, whose tokens then differ; give numbers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_and_code_2(
    case: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, advice = BAD[case]
    with pytest.raises(SystemExit) as ended:
        run(f"{line.format(source=source)} --out {tmp_path / 'out'}")
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert advice in error
    assert not list((tmp_path / "out").rglob("result.json"))


def test_help_shows_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("knn --help")
    assert ended.value.code == 0
    assert "--registers" in capsys.readouterr().out
