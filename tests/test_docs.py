import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vitreg_recipes.runs import RUNS, notes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_example_of_the_readme_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line]) == 5
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert found.stdout == "torch.Size([1, 384]) torch.Size([1, 4, 384]) torch.Size([1, 384, 14, 14])\n"


def test_the_examples_on_models_run_one_after_the_other(tmp_path: Path) -> None:
    code = "\n".join(blocks(ROOT / "docs" / "models.md", "python"))
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for line in ("torch.Size([2, 192]) torch.Size([2, 4, 192]) torch.Size([2, 12, 192]) (3, 4)", "['1.62%', '6.48%']"):
        assert line in found.stdout


def test_the_example_of_lost_runs(tmp_path: Path) -> None:
    code = "\n".join(blocks(ROOT / "docs" / "evaluation.md", "python"))
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert re.match(r"\(\d+, \d+, \d+, \d+\) \d+ \d+\n", found.stdout)


def test_the_table_of_runs_says_what_the_runs_say() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    for name in RUNS:
        told = notes(name)
        assert f"| `{name}` | {told.summary} | {told.published} | {told.measured} | {told.cost} |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return sorted({line.split("  #")[0].strip() for line in lines if "vitreg-eval" in line or "apps/" in line})


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_docs_have_options_that_exist(command: str) -> None:
    words = shlex.split(command.split("uv run ")[-1])
    words = words[next(i for i, word in enumerate(words) if word == "vitreg-eval" or word.startswith("apps/")) :]
    script = (
        [str(Path(sys.executable).parent / "vitreg-eval")] if words[0] == "vitreg-eval" else [sys.executable, words[0]]
    )
    rest = [word for word in words[1:] if word != "--resume"]
    found = subprocess.run([*script, *rest, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
