"""Fixtures of the core tests."""

import os
from pathlib import Path

import pytest
import torch


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
