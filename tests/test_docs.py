"""The documentation does what it says: blocks run, commands exist, links lead somewhere, the site builds."""

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent

import pytest
from accelerate.commands.launch import launch_command_parser
from markdown.extensions.toc import slugify
from torch.distributed.run import get_args_parser
from vitreg_core import cost, options
from vitreg_eval import cli
from vitreg_eval.config.paper import FIGURES, TABLES
from vitreg_recipes.plan import Hardware, plan
from vitreg_recipes.runs import RUNS, find, notes

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "packages").glob("*/README.md")),
]
FREE = {  # what is no command of ours, word for word
    "pip install -q uv",
    "pip install vitreg-core",
    "pip install vitreg-recipes",
    "pip install vitreg-eval",
    "uv sync",
    "uv run pytest",
    "uv run mkdocs build --strict",
    "rm -rf dist",
    "uv build --all-packages --out-dir dist",
    "git tag v0.1.0",
    "uv publish dist/*",
}


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every block of a page."""
    for _, language, text in re.findall(r"^( *)```(\w*)\n(.*?)^\1```", page.read_text(), re.DOTALL | re.MULTILINE):
        yield language, dedent(text)


def blocks(page: Path, language: str) -> list[str]:
    return [text for one, text in fences(page) if one == language]


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_block_is_of_a_kind_that_is_checked(page: Path) -> None:
    assert {language for language, _ in fences(page)} <= {"python", "sh", "text"}
    assert page.read_text().count("```") == 2 * len(list(fences(page)))


# Python


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=title)
def test_python_blocks_run_one_after_the_other(page: Path, place: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    found = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for line in EXPECTED.get(title(page), ()):
        assert re.search(line, found.stdout), found.stdout


EXPECTED = {
    "README.md": [r"^torch.Size\(\[1, 384\]\) torch.Size\(\[1, 4, 384\]\) torch.Size\(\[1, 384, 14, 14\]\)\n$"],
    "docs/doctor.md": ["outliers .*-> 0.00%", r"torch.Size\(\[4, 96, 4, 4\]\)"],
    "docs/evaluation.md": [r"^\(\d+, \d+, \d+, \d+\) \d+ \d+\n"],
    "docs/models.md": [r"torch.Size\(\[2, 192\]\) torch.Size\(\[2, 4, 192\]\)", r"\['1.62%', '6.48%'\]"],
    "packages/core/README.md": ["True"],
}


def test_the_example_of_the_readme_is_short() -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line]) == 5


def test_what_the_guide_keeps_is_a_model_without_outliers(place: Path) -> None:
    code = blocks(ROOT / "docs" / "doctor.md", "python")[0]
    check = "from vitreg_core.outliers import *\nfor one in ('path/to/weights', 'mended'): "
    check += "print(find_outliers(patch_norms(load_model(one), images)[-1]).found)"
    found = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], cwd=place, capture_output=True, text=True, check=True
    )
    assert found.stdout.endswith("True\nFalse\n")


# Commands


def commands(page: Path) -> Iterator[str]:
    """Every command of the sh blocks, and those of ours within the text, but for ones with brackets or dots."""
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            yield from (part for part in re.sub(r"(^|\s+)# .*", "", line).split(" && ") if part.strip())
    for code in re.findall(r"`((?:uv run|vitreg-eval [a-z]|apps/\w+\.py) ?[^`]+)`", page.read_text()):
        if not re.search(r"\.\.\.|<|NAME|[A-Z]{4}\b|\|", " ".join(code.split())):
            yield " ".join(code.split())


COMMANDS = sorted({command for page in PAGES for command in commands(page)} - FREE)


def launched(words: list[str]) -> list[str]:
    """A command without what starts it: environment, uv, and launchers, whose own options are checked."""
    while "=" in words[0]:
        words = words[1:]
    if words[:2] == ["uv", "run"]:
        words = words[2:]
        if words[0] == "--group":
            groups = (ROOT / "pyproject.toml").read_text().split("[dependency-groups]")[1].split("\n[")[0]
            assert f"{words[1]} = [" in groups
            words = words[2:]
    if words[:2] == ["accelerate", "launch"]:
        parsed = launch_command_parser().parse_args(words[2:])
        assert parsed.config_file is None or (ROOT / parsed.config_file).exists()
        return [parsed.training_script, *parsed.training_script_args]
    if words[0] == "torchrun":
        parsed = get_args_parser().parse_args(words[1:])
        return [parsed.training_script, *parsed.training_script_args]
    if words[:2] == ["sbatch", "configs/slurm.sh"]:
        return ["apps/train.py", *words[2:]]
    return words


def start_app(path: str) -> Callable[[], object]:
    return lambda: runpy.run_path(str(ROOT / path), run_name="__main__")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_options_that_exist(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *arguments = launched(shlex.split(command))
    if program == "bash" or program.startswith(("benchmarks/", ".ci/", "docs/", "python")):
        assert (ROOT / (arguments[0] if program in ("bash", "python") else program)).is_file()
        return
    if program in ("pytest", "ruff", "mkdocs"):
        assert arguments in ([], ["format"], ["serve"])
        return
    assert program == "vitreg-eval" or program.startswith("apps/"), f"{command}: neither ours nor in FREE"
    monkeypatch.setattr(options, "print_help", lambda *_: sys.exit(0))  # which comes after all options were checked
    lists = program in ("apps/train.py", "apps/plan.py") and not arguments
    help_or_list = [] if lists else [*arguments, "--help"]
    monkeypatch.setattr(sys, "argv", [program, *help_or_list])
    try:
        cli.main(help_or_list) if program == "vitreg-eval" else start_app(program)()
    except SystemExit as end:
        assert end.code == 0, capsys.readouterr().err


def test_a_command_with_a_wrong_option_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("vitreg-eval doctor --modle A", "uv run apps/train.py deit3_scenes --stesp 3"):
        with pytest.raises(AssertionError, match="did you mean"):
            test_commands_have_options_that_exist(command, monkeypatch, capsys)


def test_commands_of_the_guide_work_on_photos(place: Path) -> None:
    page = ROOT / "docs" / "doctor.md"
    (command,) = (one for one in commands(page) if "--remedy test-time" in one and "--images" in one)
    words = shlex.split(command.removeprefix("uv run "))
    words[0] = str(Path(sys.executable).parent / words[0])
    found = subprocess.run(words, cwd=place, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for name in ("doctor.html", "findings.json", "result.json"):
        assert name in page.read_text()
        assert (place / "runs" / "eval" / "doctor" / name).is_file()


# Tables


def test_the_table_of_runs_says_what_the_runs_say() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    for name in RUNS:
        told = notes(name)
        assert f"| `{name}` | {told.summary} | {told.published} | {told.measured} | {told.cost} |" in page


def test_the_page_on_the_paper_names_every_figure_and_table() -> None:
    page = (ROOT / "docs" / "paper.md").read_text()
    named = re.findall(r"`vitreg-eval paper ([a-z]\w*)", page)
    assert set(named) == {*FIGURES, *TABLES}


def test_the_plan_in_print_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ROOT / "docs" / "distributed.md"
    (command,) = (one for one in commands(page) if "apps/plan.py" in one and "--mfu" in one)
    monkeypatch.setattr(sys, "argv", shlex.split(command)[2:])
    start_app("apps/plan.py")()
    assert blocks(page, "text") == [capsys.readouterr().out]


def test_the_table_of_costs_is_what_the_plan_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "model_cost", cache(cost.model_cost))  # which takes seconds for large models
    page = (ROOT / "docs" / "distributed.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| `\w+` .*", page, re.MULTILINE)]
    assert len(rows) == 6
    for name, hours, *cells in rows:
        for cell, gpus in zip(cells, (1, 8, 32), strict=True):
            if cell == "-":
                continue
            found = plan(find(name.strip("`")), Hardware(gpus=gpus))
            assert float(hours) == round(found.days * 24 * gpus)
            told = cell.split(" days")[0]
            assert float(told) == round(found.days, len(told.partition(".")[2]))
            parts = [f"--accumulate {found.accumulate}"] if found.accumulate > 1 else []
            assert re.findall(r"`(.*)`", cell) == parts


# Links and the site


def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return {slugify(heading.strip(), "-") for heading in re.findall(r"^#+ (.*)", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target
        inside = (ROOT / "docs") in page.parents
        assert not inside or (ROOT / "docs") in found.resolve().parents, f"{target} leaves the site"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.search(r"<(?:script|img|iframe|source)[^>]+src=\"?(?:https?:)?//", text), page
        assert not re.search(r"<link[^>]+(?:stylesheet|preconnect|icon)[^>]*href=\"?(?:https?:)?//", text), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text()), style


def test_the_site_documents_every_public_name_of_the_core(site: Path) -> None:
    import vitreg_core

    text = (site / "api" / "core.html").read_text()
    homes = (f'id="vitreg_core.{vitreg_core.HOMES[name]}.{name}"' for name in vitreg_core.__all__)
    assert [home for home in homes if home not in text] == []
