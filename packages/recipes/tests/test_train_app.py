import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from vitreg_core import load_model
from vitreg_core.data.images import read_image
from vitreg_recipes import train
from vitreg_recipes.config import TrainConfig

Tiny = Callable[..., TrainConfig]
APP = Path(__file__).parents[3] / "apps" / "train.py"


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


def test_a_printed_config_gives_the_same_run(
    app: ModuleType, capsys: pytest.CaptureFixture[str], tiny_options: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        app.main(["deit3_scenes", *tiny_options, "--ema", "0.9", "--print-config"])
    assert stopped.value.code == 0
    Path("run.yaml").write_text(capsys.readouterr().out)
    assert not Path("runs").exists()
    ours = app.parse("deit3_scenes", ["--config", "run.yaml", "--seed", "3"])
    theirs = app.parse("deit3_scenes", [*tiny_options, "--ema", "0.9", "--seed", "3"])
    assert ours == theirs
    assert ours[0].ema == 0.9


def test_from_own_photos_to_a_model_that_names_one(
    app: ModuleType, capsys: pytest.CaptureFixture[str], tiny_options: list[str], photos: Path
) -> None:
    app.main(["deit3_scenes", *tiny_options])
    capsys.readouterr()
    own = ["--data.path", str(photos), "--init", "runs/deit3_scenes", "--out", "runs/mine"]
    unnamed = [word for pair in zip(*[iter(tiny_options)] * 2, strict=True) if "model" not in pair[0] for word in pair]
    app.main(["deit3_scenes", *unnamed, "--model.image_size", "16", *own])
    printed = capsys.readouterr().out
    snippet = printed[printed.index("from pathlib") : printed.index("trained; next")]
    ran = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() in {"cat", "dog"}
    model, photo = load_model("runs/mine"), photos / "train" / "cat" / "0.png"
    logits = model.classify(model.preprocess(read_image(photo))[None])
    assert ran.stdout.strip() == ["cat", "dog"][int(logits.argmax())]
    assert model.config.num_classes == 2
    with pytest.raises(SystemExit):
        app.main(["deit3_scenes", *own, "--model.depth", "2"])
    assert "option --model.depth with init=runs/deit3_scenes: it comes with the weights" in capsys.readouterr().err


def test_evaluations_measure_the_validation_split(
    app: ModuleType,
    capsys: pytest.CaptureFixture[str],
    tiny_options: list[str],
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["deit3_scenes", *tiny_options, "--evaluate_every", "8"]
    own = ["--data.path", str(photos), "--out", "runs/mine"]
    with pytest.raises(SystemExit):
        app.main([*options, *own])
    assert f"evaluations need {photos}/val, which is not there; make it, or do not" in capsys.readouterr().err
    shutil.copytree(photos / "train", photos / "val")
    app.main([*options, *own])
    found = json.loads(Path("runs/mine/evaluations.jsonl").read_text())
    model, right = load_model("runs/mine"), 0
    for label, name in enumerate(("cat", "dog")):
        for path in (photos / "val" / name).iterdir():
            right += int(model.classify(model.preprocess(read_image(path))[None]).argmax()) == label
    assert found["head_top1"] == pytest.approx(right / 7)
    assert found["knn_top1"] == pytest.approx(knn_top1(Path("runs/mine"), photos))
    for split in ("train", "val"):
        (photos / split / ".cache").mkdir()
        (photos / split / "cat" / "0.jpg").write_bytes(b"broken")
    app.main([*options, "--data.path", str(photos), "--out", "runs/broken"])
    assert Path("runs/broken/evaluations.jsonl").exists()
    assert "cat/0.jpg'" not in capsys.readouterr().out  # the program names a photo that can be read
    monkeypatch.setattr("vitreg_eval.training.TRAIN_SCENES", 100)
    monkeypatch.setattr("vitreg_eval.training.TEST_SCENES", 50)
    app.main(options)
    scenes = json.loads(Path("runs/deit3_scenes/evaluations.jsonl").read_text())
    assert 0 <= scenes["knn_top1"] <= 1
    assert 0 <= scenes["head_top1"] <= 1


def knn_top1(run: Path, photos: Path) -> float:
    """Votes of scikit-learn's neighbours, weighted as DINOv2 does."""
    from sklearn.neighbors import KNeighborsClassifier

    model = load_model(run)
    images = [
        model.preprocess(read_image(path))
        for name in ("cat", "dog")
        for path in sorted((photos / "val" / name).iterdir())
    ]
    with torch.no_grad():
        features = torch.nn.functional.normalize(model(torch.stack(images)).cls, dim=-1).numpy()
    labels = [0] * 3 + [1] * 4
    voting = KNeighborsClassifier(7, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    return float(voting.fit(features, labels).score(features, labels))


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, f"{sys.executable} apps/train.py deit3_scenes --seed 1 --resume"),
        ({"UV": "uv"}, f"uv run {sys.executable} apps/train.py deit3_scenes --seed 1 --resume"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch apps/train.py deit3_scenes --seed 1 --resume"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"},
            "accelerate launch --num_processes 4 apps/train.py deit3_scenes --seed 1 --resume",
        ),
        (
            {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            "env ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 apps/train.py deit3_scenes --seed 1 --resume",
        ),
    ],
)
def test_the_command_to_continue_is_the_one_that_started(
    app: ModuleType, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], command: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["apps/train.py", "ignored"])
    assert app.resume_command(["deit3_scenes", "--resume", "--seed", "1"], environment) == command


def long_run(tiny_options: list[str], out: Path) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a run of 80 steps."""
    options = [*tiny_options, "--steps", "80", "--save_every", "10", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "UV"}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return [sys.executable, str(APP), "deit3_scenes", *options], environment


def wait_for(path: Path, running: subprocess.Popen) -> None:
    """Wait until a running program has written something."""
    while not path.exists():
        assert running.poll() is None
        time.sleep(0.01)


def test_a_run_that_is_killed_and_then_stopped_resumes_to_the_same_weights(
    tiny: Tiny, tmp_path: Path, tiny_options: list[str]
) -> None:
    out = tmp_path / "with a space"
    command, environment = long_run(tiny_options, out)
    killed = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    wait_for(out / "checkpoints" / "step_000010", killed)
    time.sleep(random.uniform(0, 0.05))
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (out / "model.safetensors").exists()
    stopped = subprocess.Popen([*command, "--resume"], env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(out / "checkpoints" / "step_000040", stopped)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate()[1]
    assert stopped.returncode == 0
    again = next(line for line in said.splitlines() if line.startswith("stopped at")).partition("continue with: ")[2]
    subprocess.run(again, shell=True, env=environment, check=True, capture_output=True)
    ours, whole = load_model(out).state_dict(), train(tiny(steps=80)).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in whole.items())
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 81, 2))
    assert not [path for path in out.rglob("*") if "tmp" in path.name]
