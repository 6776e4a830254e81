"""What a result was made with: versions and commit."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("vitreg-core", "vitreg-recipes", "vitreg-eval", "torch", "timm", "accelerate", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout that vitreg runs from, `+changes` where it differs; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = git(here, "rev-parse", "HEAD")
        return f"{head}+changes" if git(here, "status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return None


def git(folder: Path, *arguments: str) -> str:
    """Output of one git command."""
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603 (fixed words)
