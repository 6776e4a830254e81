import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from vitreg_core import load_model
from vitreg_recipes import train
from vitreg_recipes.config import TrainConfig

Tiny = Callable[..., TrainConfig]
APP = Path(__file__).parents[3] / "apps" / "train.py"


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """apps/train.py as a module, in an empty folder."""
    specification = importlib.util.spec_from_file_location("train_app", APP)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "train_app", module)
    specification.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_alone_it_lists_the_runs(app: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    app.main(arguments)
    printed = capsys.readouterr().out
    assert "deit3_scenes  A small ViT on drawn scenes" in printed
    assert "usage: accelerate launch apps/train.py RUN" in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["deit3_scene"], "train.py: error: unknown run 'deit3_scene'; did you mean deit3_scenes"),
        (["deit3_scenes", "--optim.lrr", "1"], "train.py: error: unknown option --optim.lrr; did you mean optim.lr"),
        (["deit3_scenes", "--optim.lr", "-1"], "train.py: error: option optim.lr='-1': Input should be greater than 0"),
        (["deit3_scenes", "--model.num_classes", "3"], "comes from the data; leave it at 0"),
        (["deit3_scenes", "--resume"], "runs/deit3_scenes: holds no run to resume"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    app: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        app.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_help_describes_every_option(app: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        app.main(["deit3_scenes", "--help"])
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(text in printed for text in ("--model.registers", "Continue the run in --out", "--optim.warmup_steps"))


def test_it_trains_and_names_the_next_command(
    app: ModuleType, capsys: pytest.CaptureFixture[str], tiny_options: list[str]
) -> None:
    app.main(["deit3_scenes", *tiny_options, "--model.registers", "1"])
    assert load_model("runs/deit3_scenes").config.registers == 1
    assert capsys.readouterr().out.endswith("vitreg-eval knn --model runs/deit3_scenes\n")


def test_a_killed_run_resumes_to_the_same_weights(tiny: Tiny, tmp_path: Path, tiny_options: list[str]) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        str(APP),
        "deit3_scenes",
        *tiny_options,
        "--steps",
        "80",
        "--save_every",
        "10",
        "--out",
        str(out),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    killed = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (out / "checkpoints" / "step_000010").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.1))
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (out / "model.safetensors").exists()
    subprocess.run([*command, "--resume"], env=environment, check=True, capture_output=True)
    ours, whole = load_model(out).state_dict(), train(tiny(steps=80)).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in whole.items())
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 81, 2))
