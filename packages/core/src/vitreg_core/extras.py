"""Packages that only some users need: imported where they are used, or named with the extra that installs them."""

import importlib
from types import ModuleType

from vitreg_core.errors import InputError


def require(module: str, extra: str, purpose: str, *, package: str = "vitreg-core") -> ModuleType:
    """Import an optional package.

    Args:
        module: what to import, such as `open_clip`.
        extra: the extra that installs it.
        purpose: what needs it, for the message.
        package: the package whose extra it is.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{purpose} needs {module}; install it with: pip install '{package}[{extra}]'") from None
