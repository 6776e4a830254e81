import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from vitreg_core import load_model
from vitreg_recipes import train
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.ema import Ema
from vitreg_recipes.state import TrainState

Tiny = Callable[..., TrainConfig]


def test_the_average_follows_its_closed_form_and_equals_timms() -> None:
    model, decay = nn.Linear(3, 2), 0.9
    ours, theirs = Ema(model, decay), ModelEmaV3(model, decay=decay)
    start, expected = model.weight.detach().clone(), model.weight.detach().double()
    for step in range(1, 11):
        with torch.no_grad():
            model.weight.copy_(start + step)
        ours.update(model)
        theirs.update(model)
        expected = decay * expected + (1 - decay) * (start.double() + step)
    torch.testing.assert_close(ours.tensors["weight"].double(), expected, rtol=1e-6, atol=1e-6)
    for name, tensor in theirs.module.state_dict().items():
        assert torch.equal(ours.tensors[name], tensor)


def test_every_step_moves_the_average_and_it_is_written_beside_the_model(tiny: Tiny, tmp_path: Path) -> None:
    weights: list[torch.Tensor] = []

    def keep(state: TrainState, metrics: object) -> None:
        weights.append(state.model.head.weight.detach().clone())

    first = train(tiny(steps=1, optim__lr=1e-30, optim__min_lr=0, optim__warmup_lr=0, optim__warmup_steps=0))
    model = train(tiny(out=tmp_path, ema=0.8, save_every=8, snapshot_every=3), hooks=[keep])
    average = first.head.weight.detach()
    expected = []
    for weight in weights:
        average = 0.8 * average + 0.2 * weight
        expected.append(average)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(load_model(tmp_path / "ema").head.weight.detach(), expected[-1], **close)
    torch.testing.assert_close(load_model(tmp_path / "snapshots/step_000003/ema").head.weight, expected[2], **close)
    assert torch.equal(load_model(tmp_path / "snapshots/step_000006").head.weight, weights[5])
    assert torch.equal(load_model(tmp_path / "ema").cls, load_model(tmp_path / "checkpoints/step_000008/ema").cls)
    assert not torch.equal(load_model(tmp_path / "ema").head.weight, model.head.weight)
    assert load_model(tmp_path / "ema").preprocess.config == model.preprocess.config


def test_an_average_changes_no_weight(tiny: Tiny) -> None:
    assert torch.equal(train(tiny(ema=0.9)).head.weight, train(tiny()).head.weight)


def test_the_average_is_evaluated_under_its_own_name(tiny: Tiny, tmp_path: Path) -> None:
    train(
        tiny(out=tmp_path, ema=0.5, evaluate_every=4),
        evaluations={"first": lambda model: {"weight": model.cls[0].item()}},
    )
    last = json.loads((tmp_path / "evaluations.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8
    assert last["first_weight"] == load_model(tmp_path).cls[0].item()
    assert last["ema_first_weight"] == pytest.approx(load_model(tmp_path / "ema").cls[0].item())
