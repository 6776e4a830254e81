"""The main job end to end, as small as it gets; and its report."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", "6", "--train_images", "128", "--test_images", "64", "--head_steps", "5"]


def quickstart(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "apps" / "quickstart.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two quickstarts from one seed."""
    folders = [tmp_path_factory.mktemp("quickstart") / name for name in ("first", "second")]
    for folder in folders:
        found = quickstart("--out", str(folder), *SMALL)
        assert found.returncode == 0, found.stderr
    return folders


def test_the_same_seed_gives_the_same_numbers(outs: list[Path]) -> None:
    first, second = (json.loads((folder / "result.json").read_text()) for folder in outs)
    assert first["metrics"] == second["metrics"]
    hashes = [{name: model["hash"] for name, model in result["models"].items()} for result in (first, second)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0].values())) == 4


def test_the_report_is_one_page_that_loads_nothing(outs: list[Path]) -> None:
    html = (outs[0] / "report.html").read_text()
    assert not re.search(r"https?://", html)
    assert html.count("data:image/png;base64,") >= 10
    for text in ("R = 0", "R = 4", "planted", "other data", "Every setting", "LOST"):
        assert text in html


def test_a_finished_quickstart_is_not_trained_again_and_photos_are_added(outs: list[Path], tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(numbers.integers(0, 256, (240, 230, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    weights = outs[0] / "r0" / "model.safetensors"
    before = weights.read_bytes()
    photos = ["--images", str(tmp_path), "--model", "vit_ti32_reg4"]
    found = quickstart("--out", str(outs[0]), *SMALL, *photos)
    assert found.returncode == 0, found.stderr
    assert weights.read_bytes() == before
    html = (outs[0] / "report.html").read_text()
    assert "Photos: Attention maps" in html
    assert "vit_ti32_reg4 (random weights)" in html


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["--images", "photos"], "--model is missing; the part on photos needs both"),
        (["--images", "photos", "--model", "nowhere"], "model source 'nowhere': no such file or folder"),
        (["--images", "nowhere", "--model", "vit_ti16"], "nowhere: no such folder; give a folder of images"),
        (["--stpes", "3"], "unknown option --stpes; did you mean steps"),
    ],
)
def test_bad_input_ends_at_once_with_one_line(arguments: list[str], advice: str) -> None:
    found = quickstart(*arguments)
    assert found.returncode == 2
    assert advice in found.stderr
    assert found.stderr.count("\n") == 1
