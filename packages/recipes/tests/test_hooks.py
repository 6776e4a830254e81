import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vitreg_core import VisionTransformer, load_model
from vitreg_core.errors import InputError
from vitreg_core.outliers import find_outliers, patch_norms
from vitreg_recipes import train
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data import Share, open_data
from vitreg_recipes.state import TrainState

Tiny = Callable[..., TrainConfig]


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(model: VisionTransformer) -> dict[str, float]:
    """An evaluation that draws from the generator, leaves the mode changed, and counts."""
    model.train()
    return {"drawn": torch.rand(()).item()}


def test_measurements_change_nothing_in_the_run(tiny: Tiny, tmp_path: Path, photos: Path) -> None:
    plain = train(tiny(data__path=str(photos)))
    measured = train(
        tiny(data__path=str(photos), out=tmp_path / "run", norms_every=1, evaluate_every=3, snapshot_every=3),
        evaluations={"chance": draw},
    )
    for name, tensor in plain.state_dict().items():
        assert torch.equal(measured.state_dict()[name], tensor), name


def test_token_norms_are_those_of_the_first_images(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(out=tmp_path, norms_every=3, snapshot_every=3)
    train(config)
    found = lines(tmp_path / "norms.jsonl")
    assert [line["step"] for line in found] == [3, 6]
    images = next(open_data(config).batches(0, Share(64, 0, 1), torch.device("cpu"))).images
    for line in found:
        model = load_model(tmp_path / "snapshots" / f"step_{line['step']:06d}")
        expected = find_outliers(patch_norms(model, images)[-1])
        assert line["median_norm"] == pytest.approx(expected.median_norm, rel=1e-5)
        assert line["max_norm"] == pytest.approx(expected.max_norm, rel=1e-5)
        assert (line["outlier_fraction"], line["cutoff"]) == (expected.fraction, expected.cutoff)


def test_evaluations_are_written_and_shown(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modes: list[bool] = []

    def mode(model: VisionTransformer) -> dict[str, float]:
        modes.append(model.training)
        return {"top1": 0.25}

    train(tiny(out=tmp_path, evaluate_every=3), evaluations={"knn": mode})
    assert lines(tmp_path / "evaluations.jsonl") == [{"step": step, "knn_top1": 0.25} for step in (3, 6, 8)]
    assert not any(modes)
    assert "step 8/8" in (shown := capsys.readouterr().err)
    assert "knn_top1 0.25" in shown
    assert "data_wait" in shown


def test_evaluations_that_nobody_gave_are_an_error(tiny: Tiny) -> None:
    with pytest.raises(InputError, match=r"evaluate_every=3 without evaluations; give train some, .* set it to none"):
        train(tiny(evaluate_every=3))


def test_lines_and_snapshots_of_a_resumed_run_are_there_once(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(out=tmp_path, norms_every=1, evaluate_every=1, snapshot_every=1, save_every=3)

    def stop(state: TrainState, metrics: object) -> None:
        if state.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, hooks=[stop], evaluations={"x": lambda model: {"y": 1.0}})
    train(config, resume=True, evaluations={"x": lambda model: {"y": 1.0}})
    for name in ("norms", "evaluations"):
        assert [line["step"] for line in lines(tmp_path / f"{name}.jsonl")] == list(range(1, 9))
    kept = sorted(path.name for path in (tmp_path / "snapshots").iterdir())
    assert kept == [f"step_{step:06d}" for step in range(1, 9)]
    assert {path.name for path in (tmp_path / "snapshots" / "step_000001").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_tracker_is_an_error(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"trackers={name}: not installed; pip install {name}, or leave it out"):
        train(tiny(out=tmp_path, trackers=(name,)))


def test_a_tracker_without_a_run_folder_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="trackers=tensorboard without a run folder; give --out"):
        train(tiny(trackers=("tensorboard",)))


READ = """
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1])
found.Reload()
print([(event.step, event.value) for event in found.Scalars("loss")])
"""


@pytest.mark.filterwarnings("ignore")  # of tensorboard's own imports
def test_tensorboard_reads_what_the_log_says(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(out=tmp_path, trackers=("tensorboard",), norms_every=4))
    read = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "vitreg")], check=True, capture_output=True, text=True
    )
    theirs = json.loads(read.stdout.replace("(", "[").replace(")", "]"))
    logged = lines(tmp_path / "log.jsonl")
    assert [step for step, _ in theirs] == [line["step"] for line in logged] == [2, 4, 6, 8]
    assert [value for _, value in theirs] == pytest.approx([line["loss"] for line in logged], rel=1e-6)
