"""The examples: short, on vitreg-core alone, and they run."""

import ast
import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOK = ROOT / "examples" / "artifacts.ipynb"


def run(name: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    found = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def imported(code: str) -> set[str]:
    """Top-level names of what a program imports."""
    nodes = list(ast.walk(ast.parse(code)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {
        name.split(".")[0] for name in plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_needs_the_core_alone(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 60
    assert imported(text) <= {"vitreg_core", "torch", *sys.stdlib_module_names}


def test_a_segmentation_head_beats_the_ground_alone(place: Path) -> None:
    found, ground = run("segmentation_head.py", "path/to/weights", cwd=place).splitlines()
    assert found.startswith("path/to/weights: mIoU 0.")
    assert float(found.split("mIoU ")[1][:5]) > 1.2 * float(ground.split(": ")[1])


def test_image_search_finds_the_picture_itself_first(place: Path) -> None:
    lines = run("image_search.py", "path/to/other", "path/to/photos", "path/to/photos/07.png", cwd=place).splitlines()
    assert len(lines) == 5
    assert lines[0] == "1.000  path/to/photos/07.png"
    assert float(lines[1].split()[0]) < 0.99
    cosines = [float(line.split()[0]) for line in lines]
    assert cosines == sorted(cosines, reverse=True)


def test_image_search_of_scenes_says_what_chance_gives(place: Path) -> None:
    assert run("image_search.py", "path/to/weights", cwd=place).endswith("by chance 0.17\n")


def tell_story(source: str | Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the notebook from top to bottom; what it prints."""
    monkeypatch.setenv("VITREG_MODEL", str(source))
    monkeypatch.delenv("VITREG_PHOTOS", raising=False)
    mpl.use("Agg")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    return printed.getvalue()


def check_story(printed: str) -> None:
    assert "outlier mode: True;" in printed
    assert re.search(r"outliers \d\.\d\d% -> 0\.[01]\d% of the patches", printed), printed
    assert printed.count("outlier mode: False") == 1


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_notebook_runs_from_top_to_bottom(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_story(tell_story(place / "path" / "to" / "weights", monkeypatch))


def test_the_notebook_shows_drawn_scenes_and_needs_the_core_and_matplotlib() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert imported(code) <= {"vitreg_core", "torch", "matplotlib", *sys.stdlib_module_names}
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    told = "".join("".join(output.get("text", "")) for output in outputs)
    check_story(told)
    assert told.startswith("128 images; 12 blocks, 0 registers")
    assert not [word for word in ("/work", "/home", "/root", "photos") if word in told]
    assert NOTEBOOK.stat().st_size < 400_000
