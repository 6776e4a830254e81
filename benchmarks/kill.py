"""Kill a training run at random moments, resume it each time, and compare it with one that nobody stopped.

    OMP_NUM_THREADS=1 uv run benchmarks/kill.py            # 20 kills; --kills and --seed choose others

Exits with 1 unless the weights, the moving average, every snapshot and the steps of the log are equal, and no temporary
file is left after the last start.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from vitreg_core.config import Config, override
from vitreg_core.options import one_line_errors, parse_options
from vitreg_recipes import TrainConfig, find
from vitreg_recipes.checkpoints import checkpoints
from vitreg_recipes.loop import train

SETTINGS = {
    "model.image_size": 16,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.depth": 2,
    "model.registers": 2,
    "model.drop_path": 0.2,
    "optim.warmup_steps": 20,
    "data.batch_size": 4,
    "ema": 0.99,
    "save_every": 7,
    "log_every": 3,
    "snapshot_every": 20,
    "norms_every": 50,
}


class KillOptions(Config):
    """Kill a small training run at random moments and resume it."""

    kills: PositiveInt = 20
    """How often to send SIGKILL."""
    steps: PositiveInt = 600
    """Optimizer steps of the run."""
    longest: PositiveFloat = 1.0
    """Seconds that a process lives at most before it is killed."""
    seed: NonNegativeInt = 0
    """Of the moments."""


def work(config: TrainConfig, *, resume: bool) -> None:
    """Train in a process of its own, silently."""
    torch.set_num_threads(1)
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (the process ends with it)
    train(config, resume=resume)


def main() -> None:
    """Kill, resume, compare, print."""
    with one_line_errors("kill.py"):
        options = parse_options(KillOptions(), sys.argv[1:], "kill.py")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        config = override(find("deit3_scenes"), SETTINGS | {"steps": options.steps})
        assert isinstance(config, TrainConfig)
        run(override(config, {"out": whole}), longest=None)
        moments, leftovers = kill_often(override(config, {"out": killed}), options)
        print(f"{len(moments)} kills of a run of {options.steps} steps; newest checkpoint at each: {moments}")
        print(f"temporary files that kills left, gone after the next start: {leftovers}")
        differing = compare(whole, killed)
    print("equal to the run that nobody stopped" if not differing else f"not equal: {differing}")
    sys.exit(bool(differing))


def kill_often(config: TrainConfig, options: KillOptions) -> tuple[list[int], int]:
    """Kill as often as asked for, then let the run end.

    Returns:
        The step of the newest checkpoint at every kill, and how many temporary files were there after one.
    """
    assert config.out is not None
    numbers = random.Random(options.seed)  # noqa: S311 (no secret)
    moments: list[int] = []
    leftovers = 0
    while len(moments) < options.kills:
        if not run(config, longest=numbers.uniform(0, options.longest)):
            raise SystemExit(f"the run ended after {len(moments)} kills; give more --steps or a smaller --longest")
        found = checkpoints(config.out / "checkpoints")
        moments.append(int(found[0].name.removeprefix("step_")) if found else 0)
        leftovers += len(temporary(config.out))
    run(config, longest=None)
    return moments, leftovers


def run(config: TrainConfig, *, longest: float | None) -> bool:
    """Start or resume a run in a process of its own; True if it was killed after so many seconds."""
    assert config.out is not None
    resume = (config.out / "run.json").exists()
    process = multiprocessing.get_context("fork").Process(target=work, args=(config,), kwargs={"resume": resume})
    process.start()
    begun = time.perf_counter()
    while longest is not None and time.perf_counter() - begun < longest and process.is_alive():
        time.sleep(0.001)
    if longest is not None and process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"a process ended with {process.exitcode}")
    return process.exitcode == -signal.SIGKILL


def temporary(out: Path) -> list[Path]:
    """Temporary files and folders of a run folder."""
    return [path for path in out.rglob("*") if path.name.startswith(("tmp", "."))]


def compare(whole: Path, killed: Path) -> list[str]:
    """What differs between two run folders, times and names of folders apart."""
    kept = {
        str(path.relative_to(out))
        for out in (whole, killed)
        for path in out.rglob("*")
        if path.is_file() and path.suffix == ".safetensors"
    }
    differing = [
        name
        for name in sorted(kept)
        if not all((out / name).exists() for out in (whole, killed))
        or (whole / name).read_bytes() != (killed / name).read_bytes()
    ]
    for name in ("log.jsonl", "norms.jsonl"):
        ours, theirs = ([strip(line) for line in (out / name).read_text().splitlines()] for out in (killed, whole))
        differing += [name] if ours != theirs else []
    print(f"compared: {len(kept)} files of weights, {len(theirs)} lines of norms")
    return differing + [str(path) for path in temporary(killed)]


def strip(line: str) -> dict[str, float]:
    """What a line says, without times; the means of a line that a kill cut in two begin anew, so only its step."""
    values = json.loads(line)
    return {"step": values["step"]} if "loss" in values else values


if __name__ == "__main__":
    main()
