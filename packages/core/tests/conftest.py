"""Fixtures of the core tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from vitreg_core import create_model
from vitreg_core.data.scenes import draw_scenes

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and so are the modules that they share


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random numbers, with one thread: on busy cores more would wait for each other."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def shared_data() -> Path:
    """The sample photos and weights, where there are any."""
    root = Path(os.environ.get("VITREG_SHARED", Path(__file__).parents[4] / "shared"))
    if not (root / "data").is_dir():
        pytest.skip(f"no sample data in {root}; set VITREG_SHARED to the folder that holds data/")
    return root / "data"


@pytest.fixture(scope="module")
def scenes() -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pictures to fit on, and others."""
    prepare = create_model("vit_ti8", image_size=64, depth=1).preprocess
    fit, fresh = (prepare.normalize(draw_scenes(96, seed=seed).image) for seed in (1, 2))
    return fit, fresh


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Leave out the shape checks, which are no part of a graph."""
    jaxtyping.config.update("jaxtyping_disable", True)  # noqa: FBT003
    yield
    jaxtyping.config.update("jaxtyping_disable", False)  # noqa: FBT003
