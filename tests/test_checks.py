import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = [
    path
    for folder in ("packages", "apps", "benchmarks", "examples", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
PACKAGES = ("core", "recipes", "eval")
CHECKS = {
    "format": ["-m", "ruff", "format", "--check", "."],
    "lint": ["-m", "ruff", "check", "."],
    "types": [
        "-m",
        "mypy",
        *(f"packages/{name}/src" for name in PACKAGES),
        "apps",
        "benchmarks",
        "examples",
        "hubconf.py",
    ],
    "layers": ["-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"],
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_tree_passes(check: str) -> None:
    found = subprocess.run([sys.executable, *CHECKS[check]], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_can_be_read_in_one_sitting(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} at line {node.lineno}"
            assert len(parameters(node)) <= 8, f"{node.name} at line {node.lineno}"


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return [argument.arg for argument in given if argument.arg not in {"self", "cls"}]


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in names.splitlines()]


def test_no_file_names_a_package_registry() -> None:
    hosts = ["py" + "pi.org", "python" + "hosted.org", "index" + "-url", "/simp" + "le/"]
    named = [path for path in tracked() for host in hosts if path.suffix != ".png" and host in path.read_text()]
    assert named == []


def test_the_lock_with_host_names_is_not_tracked() -> None:
    assert "uv.lock" not in {path.name for path in tracked()}
