import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from vitreg_core.config import ViTConfig, override
from vitreg_core.cost import count_flops, on_meta
from vitreg_core.errors import InputError
from vitreg_core.presets import preset_config
from vitreg_recipes.config import TrainConfig, local_batch
from vitreg_recipes.dinov2.config import DinoConfig
from vitreg_recipes.runs import RUNS, find, list_runs, notes
from vitreg_recipes.runs.registers import GRID, VARIANTS

IN1K, IN22K = 1_281_167, 14_197_122
SHARED_800 = {
    "optim.name": "lamb",
    "optim.weight_decay": 0.05,
    "optim.schedule": "epochs",
    "optim.warmup_epochs": 5,
    "optim.warmup_lr": 1e-6,
    "optim.min_lr": 1e-5,
    "data.batch_size": 2048,
    "data.augment": "three",
    "data.repeats": 3,
    "mix.mixup": 0.8,
    "mix.cutmix": 1.0,
    "loss.name": "bce",
    "loss.smoothing": 0.0,
    "model.layer_scale": 1e-4,
    "model.drop_path_schedule": "constant",
    "model.class_position": False,
    "model.registers": 0,
    "model.num_classes": 0,
    "epochs": 800,
    "steps": None,
    "seed": 0,
    "init": None,
}
SHARED_400 = SHARED_800 | {"epochs": 400, "optim.weight_decay": 0.03}
SHARED_FINE_TUNE = SHARED_800 | {
    "optim.name": "adamw",
    "optim.lr": 1e-5,
    "optim.weight_decay": 0.1,
    "data.batch_size": 512,
    "data.augment": "rand_augment",
    "data.repeats": 1,
    "loss.name": "ce",
    "loss.smoothing": 0.1,
    "epochs": 20,
}
SHARED_22K = SHARED_800 | {
    "optim.lr": 1e-3,
    "optim.weight_decay": 0.02,
    "data.augment": "three_simple_crop",
    "data.repeats": 1,
    "mix.mixup": 0.0,
    "loss.name": "ce",
    "loss.smoothing": 0.1,
    "epochs": 240,
}
SHARED_TO_1K = SHARED_22K | {"optim.lr": 3e-4, "epochs": 50}
ROWS: list[tuple[str, dict[str, Any], int, float | None, float, str | None]] = [
    # name, what its table shares, pixels, learning rate, drop path, starts from
    ("deit3_s16", SHARED_800, 224, 4e-3, 0.05, None),
    ("deit3_b16", SHARED_800, 192, 3e-3, 0.2, None),
    ("deit3_l16", SHARED_800, 192, 3e-3, 0.45, None),
    ("deit3_h14", SHARED_800, 160, 3e-3, 0.6, None),
    ("deit3_s16_400", SHARED_400, 224, 4e-3, 0.0, None),
    ("deit3_b16_400", SHARED_400, 192, 3e-3, 0.1, None),
    ("deit3_l16_400", SHARED_400, 192, 3e-3, 0.4, None),
    ("deit3_b16_ft224", SHARED_FINE_TUNE, 224, None, 0.2, "deit3_b16"),
    ("deit3_l16_ft224", SHARED_FINE_TUNE, 224, None, 0.45, "deit3_l16"),
    ("deit3_h14_ft224", SHARED_FINE_TUNE, 224, None, 0.55, "deit3_h14"),
    ("deit3_s16_ft384", SHARED_FINE_TUNE, 384, None, 0.0, "deit3_s16"),
    ("deit3_b16_ft384", SHARED_FINE_TUNE, 384, None, 0.15, "deit3_b16_ft224"),
    ("deit3_l16_ft384", SHARED_FINE_TUNE, 384, None, 0.4, "deit3_l16_ft224"),
    ("deit3_s16_in22k", SHARED_22K, 224, None, 0.05, None),
    ("deit3_b16_in22k", SHARED_22K, 224, None, 0.1, None),
    ("deit3_l16_in22k", SHARED_22K, 224, None, 0.3, None),
    ("deit3_h14_in22k", SHARED_22K | {"epochs": 90}, 128, None, 0.5, None),
    ("deit3_s16_in22k_90", SHARED_22K | {"epochs": 90}, 224, None, 0.0, None),
    ("deit3_b16_in22k_90", SHARED_22K | {"epochs": 90}, 224, None, 0.1, None),
    ("deit3_l16_in22k_90", SHARED_22K | {"epochs": 90}, 224, None, 0.3, None),
    ("deit3_s16_in22k_ft1k", SHARED_TO_1K, 224, None, 0.05, "deit3_s16_in22k"),
    ("deit3_b16_in22k_ft1k", SHARED_TO_1K, 224, None, 0.15, "deit3_b16_in22k"),
    ("deit3_l16_in22k_ft1k", SHARED_TO_1K, 224, None, 0.4, "deit3_l16_in22k"),
    ("deit3_h14_in22k_ft1k", SHARED_TO_1K, 224, None, 0.45, "deit3_h14_in22k"),
    ("deit3_b16_in22k_reg4", SHARED_22K | {"model.registers": 4}, 224, None, 0.1, None),
    *(
        (f"deit3_s16_study_reg{n}", SHARED_800 | {"data.batch_size": 1024, "model.registers": n}, 224, 4e-3, 0.05, None)
        for n in (0, 2, 4, 8, 16)
    ),
]


def differences(one: TrainConfig, other: TrainConfig) -> set[str]:
    """Dotted names of the fields that two runs do not share."""
    ours, theirs = one.model_dump(), other.model_dump()
    sections = {name: (ours[name], theirs[name]) for name in ours}
    flat: set[str] = set()
    for name, (a, b) in sections.items():
        if isinstance(a, dict):
            flat |= {f"{name}.{field}" for field in a if a[field] != b[field]}
        elif a != b:
            flat.add(name)
    return flat


@pytest.mark.parametrize(("name", "shared", "size", "lr", "drop_path", "start"), ROWS, ids=[row[0] for row in ROWS])
def test_every_row_of_the_published_tables_is_a_run(
    name: str, shared: dict[str, Any], size: int, lr: float | None, drop_path: float, start: str | None
) -> None:
    row = {"model.image_size": size, "model.drop_path": drop_path} | ({} if lr is None else {"optim.lr": lr})
    expected = shared | row | {"init": start and f"runs/{start}"}
    assert differences(find(name), override(find(name), expected)) == set()


@pytest.mark.parametrize("name", [name for name in RUNS if re.match(r"(deit3|outliers)_[sblh]1", name)])
def test_shapes_are_those_of_the_presets(name: str) -> None:
    preset, ours = preset_config("vit_" + name.split("_")[1]), find(name).model
    shapes = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "class_token", "position", "norm_eps")
    assert [getattr(ours, shape) for shape in shapes] == [getattr(preset, shape) for shape in shapes]


@pytest.mark.parametrize("name", [*RUNS, *VARIANTS, *GRID])
def test_runs_are_valid_but_for_the_run_they_start_from(name: str) -> None:
    config = find(name)
    if isinstance(config, DinoConfig) and config.teacher.source is not None:
        assert find(config.teacher.source.removeprefix("runs/")).model.registers == config.model.registers
        config = override(config, {"teacher.source": "a folder"})
    if config.init is None:
        config.check()
    else:
        with pytest.raises(
            InputError, match=f"init={config.init}: nothing there to fine-tune; train .* first, or give"
        ):
            config.check()
        override(config, {"init": "vit_s16"}).check()
        assert find(config.init.removeprefix("runs/")).model.registers == config.model.registers
    assert local_batch(config, 4) == config.data.batch_size // 4


def flops(config: ViTConfig) -> int:
    """Of a forward pass; every block costs the same."""
    one, two = (count_flops(on_meta(override(config, {"depth": depth})), *config.size) for depth in (1, 2))
    return one + (config.depth - 1) * (two - one)


@pytest.mark.parametrize(
    "name", [name for name in RUNS if "FLOPs" in notes(name).cost and isinstance(find(name), TrainConfig)]
)
def test_costs_are_those_of_the_model_and_the_schedule(name: str) -> None:
    stated = re.match(r"([\d.e]+) images, ([\d.e]+) FLOPs", notes(name).cost)
    assert stated
    config = find(name)
    images = (config.epochs or 0) * (IN22K if config.data.path == "imagenet22k" else IN1K)
    images = images or (config.steps or 0) * config.data.batch_size
    mean = override(config.model, {"registers": config.model.registers // (1 + config.elastic.sample)})
    assert float(stated[1]) == pytest.approx(images, rel=0.01)
    assert float(stated[2]) == pytest.approx(3 * images * flops(mean), rel=0.01)


def test_the_list_says_what_is_published_and_what_is_ours() -> None:
    listed = list_runs()
    assert set(listed) == {*RUNS, *VARIANTS}
    assert listed["deit3_s16_study_reg4"] == (
        "ViT-S/16 of the study of small models: deit3_s16 at batch 1024; registers: 4. "
        "Published: 80.81 %; LOST 17.92 on VOC07 (study, table 1). Ours: not yet."
    )
    for line in listed.values():
        assert re.fullmatch(r"[^.].+\. Published: .+\. Ours: .+\.", line)
        assert len(line) < 300
    assert all(notes(name).cost for name in RUNS)


def test_any_number_of_registers_is_a_run() -> None:
    assert differences(find("deit3_h14_reg7"), find("deit3_h14")) == {"model.registers"}
    assert find("deit3_h14_reg7").model.registers == 7
    assert find("deit3_b16_ft384_reg2").init == "runs/deit3_b16_ft224_reg2"
    assert notes("deit3_h14_reg7").published == "none"
    assert notes("deit3_h14_reg7").cost == notes("deit3_h14").cost


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("deit3_s61", "deit3_s16"),
        ("deit3_s61_reg3", "deit3_s16_reg3"),
        ("deit3_b16_in21k_reg4", "deit3_b16_in22k_reg4"),
        ("deit3_s16_reg", "deit3_s16"),
        ("deit3_s16_reg-1", "deit3_s16"),
    ],
)
def test_an_unknown_run_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match=rf"unknown run '{name}'; did you mean {nearest}.*\?; train.py alone lists"):
        find(name)


def test_the_ablation_changes_one_thing_at_a_time() -> None:
    first = find(GRID[0])
    changed = [differences(first, find(name)) for name in GRID if "scenes" not in name]
    assert changed == [
        set(),
        {"model.registers"},
        *(fields | extra for fields in (
            {"mix.mixup", "mix.cutmix"}, {"epochs"}, {"optim.name", "optim.lr"}, {"model.layer_scale"}
        ) for extra in (set(), {"model.registers"})),
    ]  # fmt: skip
    assert differences(find("outliers_scenes"), find("outliers_scenes_reg4")) == {"model.registers"}
    assert all(find(name).norms_every for name in GRID)


def test_elastic_runs_differ_from_plain_ones_in_their_registers() -> None:
    for name, plain in (
        ("deit3_scenes_elastic", "deit3_scenes"),
        ("deit3_s16_elastic", "deit3_s16"),
        ("deit3_scenes_diverse", "deit3_scenes"),
    ):
        assert all(re.match(r"model\.registers|elastic\.", field) for field in differences(find(name), find(plain)))
    assert find("deit3_scenes_elastic").elastic.sample
    assert find("deit3_scenes_diverse").elastic.diversity > 0


def test_the_study_sees_its_snapshots_at_whole_epochs() -> None:
    epoch = IN1K // 1024  # timm's sampler keeps 1 281 024 images, which is 1251 batches of 1024
    assert find("deit3_s16_study").snapshot_every == 10 * epoch
    assert find("deit3_s16_study").norms_every == epoch
    assert math.floor(IN1K / 256) * 256 == epoch * 1024


def test_runs_need_no_torch() -> None:
    code = "import sys, vitreg_recipes.runs as r; r.list_runs(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def ablations() -> ModuleType:
    """apps/ablations.py as a module."""
    specification = importlib.util.spec_from_file_location("ablations", Path(__file__).parents[3] / "apps/ablations.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def write_run(folder: Path, config: TrainConfig, *, finished: bool) -> None:
    """A run folder as training leaves it."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"config": config.model_dump(mode="json"), "steps": 900}))
    (folder / "log.jsonl").write_text('{"step": 20, "loss": 2.5}\n{"step": 900, "loss": 0.25}\n{"step": 9')
    if finished:
        (folder / "model.safetensors").touch()
        (folder / "norms.jsonl").write_text(
            '{"step": 1, "outlier_fraction": 0.0, "median_norm": 1.0, "max_norm": 2.0}\n'
            '{"step": 900, "outlier_fraction": 0.0237, "median_norm": 40.0, "max_norm": 523.75}\n'
        )


def test_the_ablation_prints_what_its_runs_show(
    ablations: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = {"data.path": "/data", "seed": 3, "out": "x"}
    write_run(tmp_path / GRID[0], override(find(GRID[0]), elsewhere), finished=True)
    write_run(tmp_path / GRID[3], override(find(GRID[3]), {"model.image_size": 128}), finished=False)
    ablations.main(["--runs", str(tmp_path)])
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0].split() == list(ablations.COLUMNS)
    assert re.split(r"  +", table[1]) == [
        "outliers_s16", "on", "100 epochs", "adamw", "-", "0", "trained", "2.37%", "40.0 to 523.8", "0.2500"
    ]  # fmt: skip
    assert "step 900 of 900 (model.image_size=128)  -" in table[4]
    assert "not started" in table[2]
    assert f"{len(GRID) - 2} not started; start one: accelerate launch apps/train.py outliers_s16_reg4" in table[-1]
    rows = json.loads(last)
    assert [row["run"] for row in rows] == list(GRID)
    assert rows[0]["outlier_fraction"] == 0.0237
    assert rows[0]["loss"] == 0.25
    assert rows[0]["changed"] == []


def test_the_ablation_needs_no_run(
    ablations: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ablations.main([])
    assert all(row["status"] == "not started" for row in json.loads(capsys.readouterr().out.splitlines()[-1]))


@pytest.mark.parametrize(
    ("damage", "advice"),
    [
        (lambda runs: (runs / GRID[0]).rmdir() or runs.rmdir(), "no such folder; give the folder in which the runs"),
        (lambda runs: (runs / GRID[0] / "run.json").write_text("{"), "not valid JSON .*remove or move that run"),
        (lambda runs: (runs / GRID[0] / "run.json").write_text('{"config": {"a": 1}}'), "a=1: unknown option"),
    ],
)
def test_the_ablation_refuses_what_it_cannot_read(
    ablations: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    advice: str,
) -> None:
    (tmp_path / "runs" / GRID[0]).mkdir(parents=True)
    damage(tmp_path / "runs")
    with pytest.raises(SystemExit) as stopped:
        ablations.main(["--runs", str(tmp_path / "runs")])
    assert stopped.value.code == 2
    assert re.fullmatch(f"ablations.py: error: .*{advice}.*\n", capsys.readouterr().err)
