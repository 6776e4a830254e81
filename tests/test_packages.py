"""Each package is built as a wheel, installed with what it declares and no more, and imported."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    "vitreg-core": [
        "vitreg_core",
        "vitreg_core.weights",
        "vitreg_core.outliers",
        "vitreg_core.planted",
        "vitreg_core.data.scenes",
    ],
    "vitreg-recipes": ["vitreg_recipes.loop", "vitreg_recipes.runs"],
    "vitreg-eval": ["vitreg_eval.cli", "vitreg_eval.report", "vitreg_eval.showcase", "vitreg_eval.tasks.classify"],
}


def run(*command: str | Path) -> str:
    found = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one wheel per package."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not on the path; run the suite with `uv run pytest`")
    folder = tmp_path_factory.mktemp("wheels")
    run("uv", "build", "-q", "--all-packages", "--wheel", "--out-dir", folder)
    return folder


@pytest.mark.parametrize("package", MODULES)
def test_a_package_installs_and_imports_alone(package: str, wheels: Path, tmp_path: Path) -> None:
    python = tmp_path / "env" / "bin" / "python"
    run("uv", "venv", "-q", tmp_path / "env")
    run("uv", "pip", "install", "-q", "--python", python, "--find-links", wheels, package)
    for module in MODULES[package]:
        run(python, "-W", "ignore", "-c", f"import {module}")
    installed = run("uv", "pip", "freeze", "--python", python)
    others = MODULES.keys() - {package, "vitreg-core"}
    assert not [name for name in others if name in installed]
    assert (python.parent / "vitreg-eval").exists() == (package == "vitreg-eval")
    if package == "vitreg-eval":
        assert "tasks:" in run(python.parent / "vitreg-eval", "--help")
        assert "doctor" in run(python.parent / "vitreg-eval", "list")
