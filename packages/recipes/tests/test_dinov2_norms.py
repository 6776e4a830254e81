"""Token norms while student and teacher train."""

import json
from pathlib import Path

import pytest
import torch
from vitreg_core import load_model
from vitreg_core.config import override
from vitreg_core.outliers import find_outliers, patch_norms
from vitreg_recipes import find, train
from vitreg_recipes.data import Share
from vitreg_recipes.dinov2.config import DinoConfig
from vitreg_recipes.dinov2.data import CropData
from vitreg_recipes.loop import set_up, start
from vitreg_recipes.measure import NORM_IMAGES, norms_of

SMALL = {
    "model.image_size": 32,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.depth": 2,
    "model.registers": 3,
    "data.batch_size": 4,
    "data.local_size": 16,
    "data.local_crops": 1,
    "head.prototypes": 12,
    "head.hidden": 16,
    "head.bottleneck": 8,
    "optim.warmup_steps": 2,
    "steps": 4,
    "save_every": 4,
    "norms_every": 2,
}


def test_norms_of_teacher_and_student_are_logged(tmp_path: Path) -> None:
    config = override(find("dinov2_scenes"), SMALL | {"out": str(tmp_path)})
    assert isinstance(config, DinoConfig)
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "norms.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    model = load_model(tmp_path)
    images = next(CropData(config).batches(0, Share(NORM_IMAGES, 0, 1), torch.device("cpu"))).images
    norms = patch_norms(model, images)[-1]
    expected, last = find_outliers(norms), lines[-1]
    assert last["median_norm"] == pytest.approx(expected.median_norm, rel=1e-5)
    assert last["max_norm"] == pytest.approx(norms.max().item(), rel=1e-5)
    assert (last["outliers"], last["cutoff"]) == (float(expected.found), expected.cutoff)
    assert last["q05"] == pytest.approx(norms.sort().values.flatten().quantile(0.05).item(), rel=1e-5)
    assert last["q05"] < last["q25"] < last["q50"] < last["q75"] < last["q95"] < last["q99"] < last["max_norm"]
    registers = model.intermediate(images, [1], norm=False)[0].registers.norm(dim=-1)
    assert last["register_mean"] == pytest.approx(registers.mean().item(), rel=1e-5)
    assert last["register_max"] == pytest.approx(registers.max().item(), rel=1e-5)
    ours = {name for name in last if not name.startswith("student_")} - {"step"}
    assert {name.removeprefix("student_") for name in last if name.startswith("student_")} == ours
    assert last["student_median_norm"] != last["median_norm"]


def test_measuring_leaves_the_student_training() -> None:
    config = override(find("dinov2_scenes"), SMALL | {"norms_every": None, "model.registers": 0})
    state = set_up(config, start(config))
    student = state.others["student"].train()
    from vitreg_recipes.measure import Norms

    found = Norms(state).measure(state, state.model)
    assert student.training
    assert student.backbone.training
    assert (found["register_mean"], found["student_register_max"]) == (None, None)


def test_planted_outliers_are_told() -> None:
    config = override(find("dinov2_scenes"), SMALL | {"model.registers": 0})
    state = set_up(config, start(config))
    model, images = state.model, torch.randn(64, 3, 32, 32)
    assert norms_of(model, images)["outliers"] == 0.0
    with torch.no_grad():
        images[:, :, :8, :8] = 5 * torch.ones(3, 8, 8)
        model.patch_embed.proj.weight[0] = 1.0
    assert norms_of(model, images)["outliers"] == 1.0
