"""Runs of DINOv2: every field of the official rows, and what belongs to several of them."""

from pathlib import Path

import pytest
from vitreg_core.errors import InputError
from vitreg_recipes import find
from vitreg_recipes.dinov2.config import CropsConfig, DinoConfig, DinoLossConfig, TeacherConfig
from vitreg_recipes.dinov2.schedules import DinoSchedule
from vitreg_recipes.runs import RUNS, list_runs, notes

EPOCH = 1250
SHAPES = {
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
    "g": (1536, 40, 24),
}
OFFICIAL = {  # of the official configs, in their units: epochs of 1,250 steps, images per GPU times GPUs
    "dinov2_l16_short": {
        "size": "l", "patch": 16, "ffn": "mlp", "hidden": 4096, "batch": 32 * 64, "epochs": 100, "lr": 4e-3,
        "peak": 5.656854e-3, "warm-up": 10, "decay": (0.04, 0.4), "momentum": 0.992, "drop path": 0.3,
        "layer decay": 0.9, "centering": "center", "separate": False, "prototypes": 65_536, "bottlenecks": (256, None),
        "local": 96, "data": "imagenet",
    },
    "dinov2_l14": {
        "size": "l", "patch": 14, "ffn": "swiglu", "hidden": 2736, "batch": 96 * 32, "epochs": 500, "lr": 2e-4,
        "peak": 3.464102e-4, "warm-up": 80, "decay": (0.04, 0.2), "momentum": 0.994, "drop path": 0.4,
        "layer decay": 1.0, "centering": "sinkhorn", "separate": True, "prototypes": 131_072, "bottlenecks": (384, 256),
        "local": 98, "data": "imagenet22k",
    },
}  # fmt: skip
OFFICIAL["dinov2_g14"] = OFFICIAL["dinov2_l14"] | {"size": "g", "hidden": 4096, "batch": 256 * 12}


def run(name: str) -> DinoConfig:
    config = find(name)
    assert isinstance(config, DinoConfig)
    config.model.model_validate(config.model.model_dump())
    return config


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_rows(name: str) -> None:
    config, row = run(name), OFFICIAL[name]
    model, optim = config.model, config.optim
    assert (model.embed_dim, model.depth, model.num_heads) == SHAPES[row["size"]]
    assert (model.patch_size, model.feed_forward, model.hidden_dim) == (row["patch"], row["ffn"], row["hidden"])
    assert (model.image_size, model.layer_scale, model.registers) == (224, 1e-5, 0)
    assert (model.drop_path, model.drop_path_schedule, model.stochastic_depth) == (
        row["drop path"],
        "constant",
        "subset",
    )
    assert (model.class_token, model.class_position, model.mask_token, model.init) == (True, True, True, "dinov2")
    assert (model.position_offset, model.position_antialias, model.norm_eps) == (0.1, False, 1e-6)
    assert config.data == CropsConfig(
        path=row["data"],
        batch_size=row["batch"],
        global_scale=(0.32, 1.0),
        local_scale=(0.05, 0.32),
        local_crops=8,
        local_size=row["local"],
        blur="effective",
        jitter=(0.4, 0.4, 0.2, 0.1),
        workers=10,
    )
    assert config.steps == row["epochs"] * EPOCH
    assert (optim.lr, optim.min_lr, optim.warmup_steps) == (row["lr"], 1e-6, row["warm-up"] * EPOCH)
    assert DinoSchedule(config, config.steps).peak == pytest.approx(row["peak"], rel=1e-6)
    assert (optim.weight_decay, optim.layer_decay, optim.patch_embed_lr) == (row["decay"], row["layer decay"], 0.2)
    assert (optim.freeze_last_steps, optim.freeze_backbone_steps, optim.clip) == (EPOCH, 0, 3.0)
    assert config.teacher == TeacherConfig(
        momentum=row["momentum"], temperature=(0.04, 0.07), temperature_steps=30 * EPOCH, source=None
    )
    assert config.loss == DinoLossConfig(
        dino=1.0, ibot=1.0, koleo=0.1, gram=0.0, centering=row["centering"], mask_share=0.5, mask_ratios=(0.1, 0.5)
    )
    own = config.ibot_head
    assert (own is not None) is row["separate"]
    assert (config.head.bottleneck, own and own.bottleneck) == row["bottlenecks"]
    for head in [config.head, *([own] if own else [])]:
        assert (head.prototypes, head.hidden, head.layers) == (row["prototypes"], 2048, 3)
    config.check()


def test_only_the_size_changes_in_the_series_of_figure_4c() -> None:
    reference = run("dinov2_l14")
    for size, shapes in SHAPES.items():
        config = run(f"dinov2_{size}14")
        assert (config.model.embed_dim, config.model.depth, config.model.num_heads) == shapes
        same = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
        assert config.model_copy(update={"model": config.model.model_copy(update=same)}) == reference
        config.check()


@pytest.mark.parametrize("registers", [0, 1, 2, 4, 8, 16])
def test_the_papers_models_differ_in_registers_alone(registers: int) -> None:
    config = run(f"dinov2_l14_in22k_reg{registers}")
    assert config.model.registers == registers
    assert (config.model.position_offset, config.model.position_antialias) == (0.0, True)
    official = {"registers": 0, "position_offset": 0.1, "position_antialias": False}
    assert config.model_copy(update={"model": config.model.model_copy(update=official)}) == run("dinov2_l14")


@pytest.mark.parametrize("size", ["s", "b", "l"])
def test_students_are_distilled_without_masks_and_drop_path(size: str) -> None:
    config = run(f"dinov2_{size}14_distill")
    assert (config.model.embed_dim, config.model.depth, config.model.num_heads) == SHAPES[size]
    assert (config.model.drop_path, config.model.feed_forward, config.masks) == (0.0, "mlp", False)
    assert DinoSchedule(config, 10).peak == pytest.approx(1e-3)
    assert config.data.batch_size == 2048
    teacher = run("dinov2_g14")
    assert (config.head, config.ibot_head, config.loss) == (teacher.head, teacher.ibot_head, teacher.loss)
    assert run(f"dinov2_{size}14_distill_reg4").teacher.source == "runs/dinov2_g14_reg4"
    with pytest.raises(InputError, match=r"teacher.source=runs/dinov2_g14: .*; train dinov2_g14 first, or give"):
        config.check()


def test_a_run_at_518_pixels_starts_from_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, before = run("dinov2_l14_high"), run("dinov2_l14")
    assert (config.init, config.model.image_size, config.steps) == ("runs/dinov2_l14", 518, 10_000)
    assert config.optim.lr < before.optim.lr
    ratio = before.steps / config.steps
    for now, then in (
        (config.optim.warmup_steps, before.optim.warmup_steps),
        (config.optim.freeze_last_steps, before.optim.freeze_last_steps),
        (config.teacher.temperature_steps, before.teacher.temperature_steps),
    ):
        assert now == then / ratio
    with pytest.raises(InputError, match="train dinov2_l14 first, or give --init SOURCE"):
        config.check()
    assert run("dinov2_l14_high_reg4").init == "runs/dinov2_l14_reg4"


@pytest.mark.parametrize(("name", "peak", "epochs"), [("dino_s16", 5e-4 * 4, 800), ("dino_b16", 7.5e-4 * 4, 400)])
def test_dino_has_neither_masks_nor_koleo(name: str, peak: float, epochs: int) -> None:
    config = run(name)
    assert (config.loss.ibot, config.loss.koleo, config.loss.centering) == (0.0, 0.0, "center")
    assert (config.masks, config.model.mask_token, config.model.layer_scale) == (False, False, None)
    assert (config.data.blur, config.data.local_crops, config.data.global_scale) == ("nominal", 10, (0.25, 1.0))
    assert (config.head.prototypes, config.head.bottleneck, config.ibot_head) == (65_536, 256, None)
    assert DinoSchedule(config, 10).peak == pytest.approx(peak)
    assert config.steps == epochs * (1_281_167 // 1024)
    config.check()


def test_every_run_says_what_is_known_of_it() -> None:
    names = [name for name in RUNS if name.startswith("dino")]
    assert len(names) == 17
    for name in names:
        told = notes(name)
        assert told.cost
        assert "COST" not in told.cost
        assert name in list_runs()
        config = run(name)
        assert config.model.patch_size * (config.data.local_size // config.model.patch_size) == config.data.local_size
