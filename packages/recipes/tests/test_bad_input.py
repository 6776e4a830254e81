"""What users get wrong, through the program: one line that says what to do, exit code 2, and a run that still loads."""

import errno
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from vitreg_core import load_model

OUT = Path("runs/deit3_scenes")
Program = Callable[[str], str]


@pytest.fixture
def refused(app: ModuleType, tiny_options: list[str], capsys: pytest.CaptureFixture[str]) -> Program:
    """Runs deit3_scenes, in a tiny size, with more options; returns the one line that it ends with."""

    def run(options: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            app.main(["deit3_scenes", *tiny_options, *shlex.split(options)])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.count("error:") == 1
        line = error[error.index("train.py: error: ") :]
        assert line.count("\n") == 1
        return line

    return run


@pytest.fixture
def trained(app: ModuleType, tiny_options: list[str]) -> list[str]:
    """A finished run in `OUT`; its options."""
    app.main(["deit3_scenes", *tiny_options])
    return tiny_options


def test_an_unknown_run_names_the_nearest(app: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        app.main(["deit3_scene"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: unknown run 'deit3_scene'; did you mean deit3_scenes?")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "value", "advice"),
    [
        ("--model.regsters 4", "--model.regsters", "did you mean model.registers?"),
        ("--optim.lr -1", "optim.lr='-1'", "greater than 0"),
        ("--model.image_size 4", "4", "patch"),
        ("--data.batch_size 5", "data.batch_size=5", "give an even share, or turn off mix.mixup and mix.cutmix"),
        ("--loss.smoothing 0.1", "loss.smoothing=0.1", "set smoothing to 0, or name to ce"),
        ("--data.path nowhere", "nowhere", "give"),
        ("--steps none", "steps=None", "give"),
        ("--resume", str(OUT), "leave out --resume"),
    ],
)
def test_options_that_cannot_be_used_start_nothing(refused: Program, options: str, value: str, advice: str) -> None:
    line = refused(options)
    assert value in line
    assert advice in line
    assert not OUT.exists()


def test_a_folder_in_use_is_left_as_it_is(trained: list[str], refused: Program) -> None:
    before = {path: path.stat().st_mtime_ns for path in OUT.rglob("*")}
    line = refused("")
    assert f"{OUT}: already holds a run" in line
    assert "give --resume or another --out" in line
    assert {path: path.stat().st_mtime_ns for path in OUT.rglob("*")} == before
    load_model(OUT)


def test_a_run_resumes_with_its_own_config_only(trained: list[str], refused: Program) -> None:
    line = refused("--resume --optim.lr 0.02")
    assert f"{OUT}: the run there has optim.lr=0.01, not 0.02" in line
    assert "resume with the same value, or give another --out" in line
    load_model(OUT)


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(
    refused: Program, app: ModuleType, tiny_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    to_disk = os.fsync

    def full(descriptor: int) -> None:
        if (OUT / "checkpoints" / "step_000002").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        to_disk(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = refused("")
    assert "No space left on device" in line
    assert "make room, then --resume" in line
    assert load_model(OUT / "checkpoints" / "step_000002").cls.isfinite().all()
    app.main(["deit3_scenes", *tiny_options, "--resume"])
    assert sorted(path.name for path in (OUT / "checkpoints").iterdir()) == ["step_000006", "step_000008"]
    load_model(OUT)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_saved(refused: Program) -> None:
    line = refused("--optim.lr 1e30 --optim.warmup_steps 0 --optim.name adamw --save_every 1 --log_every 1 --steps 50")
    assert "loss is nan" in line
    assert "lower optim.lr=1e+30" in line
    saved = sorted((OUT / "checkpoints").iterdir())
    assert saved
    assert all(load_model(folder).cls.isfinite().all() for folder in saved)
