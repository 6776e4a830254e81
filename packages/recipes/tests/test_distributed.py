"""Several processes, and what starts them. Run as a script it is one of two processes that train."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from vitreg_core.errors import InputError
from vitreg_recipes import train
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.loop import start
from vitreg_recipes.state import TrainState

Tiny = Callable[..., TrainConfig]
ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "distributed.md"
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


class Recorder:
    """Losses and gradients of every step of `train`, and the weights that it gives."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.gradients: list[list[Tensor]] = []

    def hook(self, state: TrainState, metrics: Mapping[str, Tensor]) -> None:
        self.losses.append(state.accelerator.reduce(metrics["loss"].clone(), "mean").cpu())

    def before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])


def record(config: TrainConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Train in a number type through the real entry point."""
    recorder = Recorder()
    handle = register_optimizer_step_pre_hook(recorder.before_step)
    torch.set_default_dtype(dtype)
    try:
        model = train(config, hooks=[recorder.hook])
    finally:
        torch.set_default_dtype(torch.float32)
        handle.remove()
    return {"losses": recorder.losses, "gradients": recorder.gradients, "weights": model.state_dict()}


def main(folder: Path) -> None:
    """What each of two processes does: train every config in `runs.json`."""
    for name, run in json.loads((folder / "runs.json").read_text()).items():
        found = record(TrainConfig(**run["config"]), getattr(torch, run["dtype"]))
        torch.save(found, folder / f"{name}_{os.environ['RANK']}.pt")


@pytest.fixture
def many_photos(tmp_path: Path) -> Path:
    """24 pictures in 3 classes."""
    numbers = np.random.default_rng(0)
    for index in range(24):
        folder = tmp_path / "photos" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 256, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return tmp_path / "photos"


def test_two_processes_train_as_one_on_the_joined_batch(tiny: Tiny, tmp_path: Path, many_photos: Path) -> None:
    alike = {
        "data__path": str(many_photos),
        "data__batch_size": 8,
        "mix__mixup": 0.0,
        "mix__cutmix": 0.0,
        "model__drop_path": 0.0,
        "optim__warmup_steps": 0,
        "optim__min_lr": 1e-2,
        "steps": 5,
    }  # with the schedule flat, all five steps take the peak learning rate
    runs = {
        "lamb": {"config": tiny(**alike), "dtype": "float64"},
        "lamb_fp32": {"config": tiny(**alike | {"steps": 1}), "dtype": "float32"},
        "adamw_parts": {"config": tiny(**alike, optim__name="adamw", accumulate=2), "dtype": "float64"},
    }
    values = {name: run | {"config": run["config"].model_dump(mode="json")} for name, run in runs.items()}
    (tmp_path / "runs.json").write_text(json.dumps(values))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, run in runs.items():
        whole = record(run["config"], getattr(torch, run["dtype"]))
        ranks = [torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True) for rank in (0, 1)]
        exact = run["dtype"] == "float64"
        for rank in ranks:
            assert len(rank["losses"]) == len(whole["losses"]) == run["config"].steps
            torch.testing.assert_close(rank["losses"], whole["losses"], rtol=0, atol=1e-12 if exact else 1e-6)
            torch.testing.assert_close(rank["gradients"], whole["gradients"], rtol=0, atol=1e-12 if exact else 1e-6)
            torch.testing.assert_close(
                rank["weights"], dict(whole["weights"]), rtol=0, atol=1e-9 if exact else 1e-3, msg=name
            )
        assert all(torch.equal(tensor, ranks[1]["weights"][key]) for key, tensor in ranks[0]["weights"].items())


def launched(*arguments: str) -> Any:  # noqa: ANN401 (argparse's namespace)
    """What `accelerate launch` makes of a command line, config file included."""
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


@pytest.mark.parametrize(
    "arguments",
    [["--cpu", "--num_processes", "2"], ["--config_file", "multi_cpu.yaml"]],
    ids=["--cpu", "MULTI_CPU"],
)
def test_a_launcher_that_starts_one_process_of_two_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("multi_cpu.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    _, environment = prepare_simple_launcher_cmd_env(launched(*arguments, "apps/train.py"))
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_PORT"):
        monkeypatch.setenv(name, environment[name])
    with pytest.raises(InputError, match=r"asked for several processes and started one; .*torchrun --nproc_per_node N"):
        start(tiny())


def test_a_lone_process_of_accelerate_launch_trains(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    _, environment = prepare_simple_launcher_cmd_env(launched("--cpu", "--num_processes", "1", "apps/train.py"))
    assert "MASTER_PORT" not in environment
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment["ACCELERATE_MIXED_PRECISION"])
    assert start(tiny()).num_processes == 1


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("WORLD_SIZE", "2", r"WORLD_SIZE=2, but Accelerate runs 1 process\(es\); .*ACCELERATE_USE_CPU=true torchrun"),
        ("SLURM_STEP_NUM_TASKS", "8", r"srun started 8 tasks .*; give --ntasks-per-node=1 .* \(configs/slurm.sh\)"),
        ("ACCELERATE_USE_FSDP", "true", r"ACCELERATE_USE_FSDP=true: give --strategy fsdp2 .* docs/distributed.md"),
    ],
)
def test_launches_that_would_train_something_else_are_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str, value: str, advice: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=advice):
        start(tiny())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_the_configs(path: Path) -> None:
    assert load_config_from_file(str(path)).distributed_type.value == "MULTI_GPU"


def commands() -> Iterator[str]:
    """Command lines of the page and of the SLURM script that start `accelerate launch`."""
    page = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
    text = page + (ROOT / "configs" / "slurm.sh").read_text()
    for line in text.replace("\\\n", " ").splitlines():
        if re.search(r"accelerate launch [^`]*apps/train", line) and not line.startswith("#"):
            yield line


@pytest.mark.parametrize("line", list(commands()))
def test_documented_launches_start_the_processes_they_say(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    line = line.replace("$((SLURM_NNODES * SLURM_GPUS_PER_NODE))", "32").replace("$SLURM_NNODES", "4")
    words = shlex.split(line.partition("accelerate launch")[2].partition("  #")[0])
    options = launched(*words)
    assert options.training_script == "apps/train.py"
    assert options.multi_gpu
    assert not options.use_fsdp
    assert options.num_processes % options.num_machines == 0
    if options.num_machines > 1:
        assert options.main_process_ip
        assert options.main_process_port == 29500


if __name__ == "__main__":
    main(Path(sys.argv[1]))
