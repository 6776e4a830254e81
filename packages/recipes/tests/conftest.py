"""Fixtures of the recipes tests."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

if TYPE_CHECKING:
    from vitreg_recipes.config import TrainConfig

APP = Path(__file__).parents[3] / "apps" / "train.py"
TINY = {
    "model.image_size": 16,
    "model.embed_dim": 8,
    "model.num_heads": 2,
    "model.depth": 1,
    "model.registers": 2,
    "model.drop_path": 0.3,
    "optim.name": "lamb",
    "optim.lr": 1e-2,
    "optim.warmup_steps": 2,
    "data.label": "class",
    "mix.mixup": 0.8,
    "mix.cutmix": 1.0,
    "loss.name": "bce",
    "data.batch_size": 4,
    "data.workers": 0,
    "steps": 8,
    "save_every": 2,
    "log_every": 2,
}
Tiny = Callable[..., "TrainConfig"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """One thread (tests share the cores), the same random numbers, and an Accelerate that was not set up before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    AcceleratorState._reset_state()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> Tiny:
    """deit3_scenes in a hundredth of a second per step; takes overrides with `__` for dots."""
    from vitreg_core.config import override  # not above: shapes are checked in what is imported after this file
    from vitreg_recipes import find

    def build(**changes: object) -> "TrainConfig":
        return override(find("deit3_scenes"), TINY | {name.replace("__", "."): v for name, v in changes.items()})

    return build


@pytest.fixture
def tiny_options() -> list[str]:
    """The same config as options of apps/train.py."""
    return [word for name, value in TINY.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An ImageFolder with 3 + 4 pictures of noise in `train`."""
    numbers = np.random.default_rng(0)
    for name, count in (("cat", 3), ("dog", 4)):
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = numbers.integers(0, 256, (24, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "photos"


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
