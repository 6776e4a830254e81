"""Two processes on the CPU, started once by torchrun on this file; the tests look at what they found."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from vitreg_core import load_model
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_recipes import TrainConfig, find, train

Tiny = Callable[..., TrainConfig]
SMALL: dict[str, Any] = {
    "model.image_size": 16,
    "model.embed_dim": 8,
    "model.num_heads": 2,
    "model.depth": 2,
    "model.registers": 3,
    "model.layer_scale": 1.0,
    "optim.name": "adamw",
    "optim.lr": 1e-3,
    "optim.warmup_steps": 0,
    "data.batch_size": 8,
    "ema": 0.9,
    "steps": 6,
    "save_every": 2,
    "log_every": 1,
}


class CrashError(Exception):
    """What stops a run here."""


def work(out: Path) -> None:
    """Do everything in one of two processes: gradients, whole runs, a crash and a resume, a batch in parts."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        config = override(find("deit3_scenes"), SMALL | {"strategy": strategy})
        torch.save(gradients(config), out / f"{strategy}_{os.environ['RANK']}.pt")
        train(override(config, {"out": out / strategy}))
        with crash_expected():
            train(override(config, {"out": out / f"{strategy}_resumed"}), hooks=[crash])
        train(override(config, {"out": out / f"{strategy}_resumed"}), resume=True)
        parts = {"accumulate": 2, "mix.mixup": 0, "mix.cutmix": 0}
        for name, count in (("whole", 1), ("parts", 2)):
            torch.save(
                gradients(override(config, parts | {"accumulate": count})),
                out / f"{strategy}_{name}_{os.environ['RANK']}.pt",
            )
    refused = override(find("deit3_scenes"), SMALL | {"strategy": "fsdp2", "optim.name": "lamb"})
    try:
        train(refused)
    except InputError as error:
        found["lamb"] = str(error)
    if os.environ["RANK"] == "0":
        (out / "found.json").write_text(json.dumps(found))


def gradients(config: TrainConfig) -> dict[str, Tensor]:
    """Mean loss of the first batch, and its whole gradient."""
    from vitreg_recipes.loop import batches, set_up, start
    from vitreg_recipes.strategy import whole

    state = set_up(config, start(config))
    loss = state.objective.step(next(batches(state)))["loss"]
    joined = whole({name: p.grad for name, p in state.model.named_parameters()}, keep=True)
    return {"loss": state.accelerator.reduce(loss, "mean"), **joined}


def crash(state: object, metrics: Mapping[str, Tensor]) -> None:
    """Stop after a step that is not saved."""
    if getattr(state, "step", 0) == 5:
        raise CrashError


@contextmanager
def crash_expected() -> Iterator[None]:
    """Go on after the crash, and fail without one."""
    try:
        yield
    except CrashError:
        return
    raise AssertionError("the run did not crash")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes left what they found."""
    out = tmp_path_factory.mktemp("strategy")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run([*command, __file__, str(out)], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return out


def tensors(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def test_split_and_copied_models_have_the_same_losses_and_gradients(found: Path) -> None:
    for rank in (0, 1):
        ours, theirs = (tensors(found / f"{strategy}_{rank}.pt") for strategy in ("fsdp2", "ddp"))
        assert ours["blocks.0.attn.qkv.weight"].abs().max() > 1e-3
        assert_close(ours, theirs, 1e-6)
    logs = [(found / strategy / "log.jsonl").read_text().splitlines() for strategy in ("fsdp2", "ddp")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("folder", ["", "ema", "checkpoints/step_000006", "checkpoints/step_000004/ema"])
def test_split_models_are_written_whole(found: Path, folder: str) -> None:
    ours, theirs = (load_model(found / strategy / folder).state_dict() for strategy in ("fsdp2", "ddp"))
    assert_close(ours, theirs, 1e-5)
    assert ours["registers.tokens"].shape == (3, 8)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("folder", ["", "ema"])
def test_two_processes_resume_to_the_same_weights(found: Path, strategy: str, folder: str) -> None:
    ours, theirs = (load_model(found / name / folder).state_dict() for name in (strategy, f"{strategy}_resumed"))
    assert_close(ours, theirs, 0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(found: Path, strategy: str) -> None:
    assert_close(tensors(found / f"{strategy}_parts_0.pt"), tensors(found / f"{strategy}_whole_0.pt"), 1e-6)


def test_lamb_cannot_be_split(found: Path) -> None:
    said = json.loads((found / "found.json").read_text())["lamb"]
    assert "strategy=fsdp2 with optim.name=lamb" in said
    assert "use strategy=ddp, or optim.name=adamw" in said


def test_a_lone_process_cannot_split(tiny: Tiny) -> None:
    AcceleratorState._reset_state()
    with pytest.raises(InputError, match=r"strategy=fsdp2 with 1 process: .*; use strategy=ddp, or start several"):
        train(tiny(strategy="fsdp2", optim__name="adamw"))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
