"""What the tests of evaluation share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products take ten times as long when threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared_data() -> Path:
    """Folder of the sample data sets: data/ below $VITREG_SHARED, or below ../shared."""
    folder = (REPOSITORY / os.environ.get("VITREG_SHARED", "../shared") / "data").resolve()
    if not folder.is_dir():
        pytest.skip(f"no sample data at {folder}; set VITREG_SHARED to the folder that holds data/")
    return folder
