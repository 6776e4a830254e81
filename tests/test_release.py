"""What a release is: one version everywhere, wheels with licence, page and notices."""

import importlib.util
import re
import shutil
import subprocess
import tomllib
import zipfile
from email.parser import Parser
from importlib.machinery import SourceFileLoader
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("core", "eval", "recipes")


def project(path: Path) -> dict:
    return tomllib.loads((path / "pyproject.toml").read_text())["project"]


VERSION = project(ROOT)["version"]


@pytest.fixture(scope="module")
def notices() -> ModuleType:
    """The program that writes the notices."""
    loader = SourceFileLoader("notices", str(ROOT / ".ci" / "notices"))
    spec = importlib.util.spec_from_loader("notices", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_packages_have_one_version() -> None:
    major, minor, _ = VERSION.split(".")
    bound = f"vitreg-core>={major}.{minor},<{major}.{int(minor) + 1}" if major == "0" else f"vitreg-core>={major}"
    for name in PACKAGES:
        found = project(ROOT / "packages" / name)
        assert found["version"] == VERSION
        assert name == "core" or [one for one in found["dependencies"] if one.startswith(bound)]
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == VERSION  # type: ignore[index]


def test_the_citation_can_be_read_and_has_the_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert found["version"] == VERSION
    assert found["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors", "references"} <= found.keys()


@pytest.mark.parametrize("name", PACKAGES)
def test_the_notices_name_every_library_and_its_licence(name: str, notices: ModuleType) -> None:
    folder = ROOT / "packages" / name
    found = (folder / "THIRD_PARTY.md").read_text()
    for library, _ in notices.libraries(project(folder)):
        assert f"| {library} | " in found
    try:
        assert found == notices.notice(folder), "run `uv run .ci/notices`"
    except PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed here, so its licence cannot be read")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one wheel and one source archive per package."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not on the path; run the suite with `uv run pytest`")
    folder = tmp_path_factory.mktemp("dist")
    command = ["uv", "build", "-q", "--all-packages", "--out-dir", str(folder)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return folder


@pytest.mark.parametrize("name", PACKAGES)
def test_a_wheel_has_its_page_licence_and_notices(name: str, wheels: Path) -> None:
    folder, stem = ROOT / "packages" / name, f"vitreg_{name}-{VERSION}"
    assert (wheels / f"{stem}.tar.gz").exists()
    with zipfile.ZipFile(wheels / f"{stem}-py3-none-any.whl") as wheel:
        about = Parser().parsestr(wheel.read(f"{stem}.dist-info/METADATA").decode())
        assert about["Name"] == f"vitreg-{name}"
        assert about["Version"] == VERSION
        assert about["Summary"] == project(folder)["description"]
        assert about["License-Expression"] == "Apache-2.0"
        assert about["Requires-Python"] == ">=3.11"
        assert about.get_payload().strip() == (folder / "README.md").read_text().strip()
        for file, same in (("LICENSE", ROOT / "LICENSE"), ("THIRD_PARTY.md", folder / "THIRD_PARTY.md")):
            assert file in about.get_all("License-File")
            assert wheel.read(f"{stem}.dist-info/licenses/{file}") == same.read_bytes()
        assert f"vitreg_{name}/py.typed" in wheel.namelist()
        assert not [file for file in wheel.namelist() if "/tests/" in file]
