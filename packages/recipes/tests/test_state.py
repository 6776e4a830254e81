import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vitreg_core import load_model
from vitreg_core.errors import InputError
from vitreg_recipes import train
from vitreg_recipes.checkpoints import checkpoints
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.state import TrainState

Tiny = Callable[..., TrainConfig]


class CrashError(Exception):
    """What stops a run in these tests."""


def crash_at(step: int) -> Callable[..., None]:
    """A hook that ends the process's work without warning."""

    def hook(state: TrainState, metrics: Mapping[str, Tensor]) -> None:
        if state.step == step:
            raise CrashError

    return hook


def crash(config: TrainConfig, step: int) -> None:
    """Train up to a step that is not saved."""
    with pytest.raises(CrashError):
        train(config, hooks=[crash_at(step)])


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    tensors = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def logged_steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_a_crashed_run_resumes_to_the_same_weights(tiny: Tiny, tmp_path: Path, optimizer: str) -> None:
    config = tiny(out=tmp_path, optim__name=optimizer, mix__mixup=0.8, mix__cutmix=1.0)
    whole = train(tiny(optim__name=optimizer, mix__mixup=0.8, mix__cutmix=1.0))
    crash(config, 5)
    torch.manual_seed(123)
    assert_same_weights(train(config, resume=True), whole)
    assert logged_steps(tmp_path) == [2, 4, 6, 8]


def test_a_crashed_run_on_photos_resumes_to_the_same_weights(
    tiny: Tiny, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "train" / "cat" / "1.png").write_bytes(b"")
    config = tiny(out=tmp_path / "run", data__path=str(photos))
    whole = train(tiny(data__path=str(photos)))
    crash(config, 7)
    assert "cat/1.png: not a readable image" in capsys.readouterr().err
    assert_same_weights(train(config, resume=True), whole)
    assert "cat/1.png" not in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert lines[-1]["skipped_images"] == 1


def test_log_lines_past_the_checkpoint_are_dropped(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(out=tmp_path, log_every=1, save_every=4)
    crash(config, 7)
    assert logged_steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    train(config, resume=True)
    assert logged_steps(tmp_path) == list(range(1, 9))


def test_a_finished_run_resumes_to_itself(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(out=tmp_path)
    assert_same_weights(train(config), train(config, resume=True))


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config = tiny(out=tmp_path)
    whole = train(config)
    newest = checkpoints(tmp_path / "checkpoints")[0]
    (newest / name).write_bytes((newest / name).read_bytes()[:500])
    assert_same_weights(train(config, resume=True), whole)
    assert f"{newest}: damaged checkpoint" in capsys.readouterr().err
    assert_same_weights(load_model(newest), whole)


def test_a_run_without_any_readable_checkpoint_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(out=tmp_path, keep_last=1)
    train(config)
    (tmp_path / "checkpoints" / "step_000008" / "state.pt").unlink()
    with pytest.raises(InputError, match="none of 1 checkpoints can be read; give another --out"):
        train(config, resume=True)


def test_a_run_that_crashed_before_its_first_checkpoint_starts_again(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(out=tmp_path)
    crash(config, 1)
    assert_same_weights(train(config, resume=True), train(tiny()))


def test_the_last_checkpoints_are_kept_and_leftovers_removed(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(out=tmp_path)
    crash(config, 3)
    leftover = tmp_path / "checkpoints" / ".step_000004.tmp"
    leftover.mkdir()
    train(config, resume=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000006", "step_000008"]


def test_a_checkpoint_is_a_model_and_holds_nothing_but_data(tiny: Tiny, tmp_path: Path) -> None:
    crash(tiny(out=tmp_path), 3)
    folder = tmp_path / "checkpoints" / "step_000002"
    model = load_model(folder)
    assert (model.config.registers, model.config.num_classes) == (2, 6)
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 2


def test_weights_that_are_not_finite_are_never_saved(tiny: Tiny, tmp_path: Path) -> None:
    def spoil(state: TrainState, metrics: Mapping[str, Tensor]) -> None:
        if state.step == 4:
            state.model.cls.data.fill_(torch.inf)

    with pytest.raises(
        InputError, match=r"step 4: cls is not finite, and is not saved; lower optim.lr=.* precision=fp32"
    ):
        train(tiny(out=tmp_path), hooks=[spoil])
    assert load_model(checkpoints(tmp_path / "checkpoints")[0]).cls.isfinite().all()


def test_sigterm_saves_and_exits_cleanly(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def terminate(state: TrainState, metrics: Mapping[str, Tensor]) -> None:
        if state.step == 3:
            signal.raise_signal(signal.SIGTERM)

    config, before = tiny(out=tmp_path, save_every=100), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(config, hooks=[terminate], command="again.sh --resume")
    assert stopped.value.code == 0
    said = f"stopped at step 3 of 8, saved in {tmp_path}; continue with: again.sh --resume"
    assert said in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step_000003"]
    assert_same_weights(train(config, resume=True), train(tiny()))


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond a size, in bytes: all that writes fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1, 2000, 12000])
def test_a_full_disk_is_one_error_and_the_run_goes_on_with_room(tiny: Tiny, tmp_path: Path, size: int) -> None:
    config, full = tiny(out=tmp_path, ema=0.9, log_every=100), small_disk(size)

    def fill(state: TrainState, metrics: Mapping[str, Tensor]) -> None:
        if state.step == 6:
            full.__enter__()

    try:
        with pytest.raises(
            InputError, match=r"step_000006: cannot be written \(.+\); make room, then --resume"
        ) as raised:
            train(config, hooks=[fill])
    finally:
        full.__exit__(None, None, None)
    assert "\n" not in str(raised.value)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_000004", "step_000002"}
    assert load_model(tmp_path / "checkpoints" / "step_000004").cls.isfinite().all()
    assert_same_weights(train(config, resume=True), train(tiny()))


def test_no_room_for_the_log_is_one_error(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, opened = tiny(out=tmp_path), Path.open

    def refuse(path: Path, mode: str = "r", **options: object) -> object:
        if path.name == "log.jsonl" and mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, mode, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(InputError, match=r"log.jsonl: cannot be written \(.*No space left.*\); make room, then"):
            train(config)
    assert_same_weights(train(config, resume=True), train(tiny()))


def test_whatever_a_killed_process_left_is_gone_after_the_next_start(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(out=tmp_path, snapshot_every=2, ema=0.5)
    crash(config, 5)
    for name in ("checkpoints/.step_000006.tmp", "snapshots/.step_000006.tmp", ".exported.tmp", "..exported.tmp.tmp"):
        (tmp_path / name / "ema").mkdir(parents=True)
    (tmp_path / ".log.jsonl.tmp").write_text("{")
    train(config, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints",
        "classes.json",
        "config.json",
        "ema",
        "log.jsonl",
        "model.safetensors",
        "run.json",
        "snapshots",
    ]
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]


@pytest.mark.parametrize("damaged", ["ema/model.safetensors", "ema"])
def test_a_damaged_average_is_a_damaged_checkpoint(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: str
) -> None:
    config = tiny(out=tmp_path, ema=0.9)
    train(config)
    average = load_model(tmp_path / "ema")
    newest = checkpoints(tmp_path / "checkpoints")[0]
    (newest / damaged).rename(newest / "away")
    train(config, resume=True)
    assert f"{newest}: damaged checkpoint" in capsys.readouterr().err
    assert_same_weights(load_model(tmp_path / "ema"), average)


def test_a_run_in_epochs_counts_the_steps_of_its_data(tiny: Tiny, tmp_path: Path, photos: Path) -> None:
    config = tiny(out=tmp_path / "run", data__path=str(photos), data__batch_size=2, steps=None, epochs=2)
    seen: list[tuple[int, int]] = []
    train(config, hooks=[lambda state, metrics: seen.append((state.steps, state.epoch_steps))])
    steps, epoch_steps = seen[0]
    assert steps == 2 * epoch_steps == len(seen)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == steps
    assert epoch_steps in (3, 4)  # 7 photos in pairs


def test_a_damaged_newer_checkpoint_costs_no_good_one(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(out=tmp_path, keep_last=1)
    crash(config, 5)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_000004", folder / "step_000012")
    (folder / "step_000012" / "state.pt").write_bytes(b"cut")
    train(config, resume=True)
    assert {path.name for path in folder.iterdir()} == {"step_000008", "step_000012"}
