"""What drawing a figure gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any, TypeVar

from matplotlib.figure import Figure
from vitreg_core.errors import InputError

from vitreg_eval.metrics import Metric
from vitreg_eval.results import DataRecord, ModelRecord

T = TypeVar("T")
WIDEST = 24
"""Letters of a line of a name."""


@dataclass(frozen=True)
class Drawing:
    """One picture."""

    figure: Figure
    caption: str


@dataclass(frozen=True)
class Drawn:
    """Pictures of a figure, with all that they show in numbers."""

    pictures: dict[str, Drawing] = field(default_factory=dict)
    """By what tells them apart in file names."""
    arrays: dict[str, Any] = field(default_factory=dict)
    """What is drawn, as results or arrays by name."""
    metrics: dict[str, dict[str, Metric]] = field(default_factory=dict)
    """Numbers to lay beside published ones, by model."""
    missing: dict[str, str] = field(default_factory=dict)
    """What could not be drawn, and why."""
    models: dict[str, ModelRecord] = field(default_factory=dict)
    """What was looked at, by the name that a reader sees."""
    data: DataRecord | None = None
    """Images that were looked at; None for figures without any."""

    def __or__(self, other: "Drawn") -> "Drawn":
        """Both together; the images are those of the first that has some."""
        names = [*self.metrics, *(name for name in other.metrics if name not in self.metrics)]
        return Drawn(
            self.pictures | other.pictures,
            self.arrays | other.arrays,
            {name: self.metrics.get(name, {}) | other.metrics.get(name, {}) for name in names},
            self.missing | other.missing,
            self.models | other.models,
            self.data or other.data,
        )


def wrapped(name: str) -> str:
    """A name in lines that fit above a panel."""
    return fill(name, WIDEST)


def parts(attempts: Mapping[str, Callable[[], Drawn]]) -> Drawn:
    """The parts of a figure that can be drawn; the others are listed with the reason.

    Raises:
        InputError: none can.
    """
    found = Drawn()
    for name, attempt in attempts.items():
        try:
            found |= attempt()
        except InputError as error:
            found.missing[name] = str(error)
    if not found.pictures:
        raise InputError("; ".join(f"{name}: {why}" for name, why in found.missing.items()))
    return found


def found_of(attempts: Mapping[str, Callable[[], T]]) -> tuple[dict[str, T], dict[str, str]]:
    """What was found for each name, and why nothing was for the others.

    Raises:
        InputError: nothing was found for any.
    """
    found: dict[str, T] = {}
    missing: dict[str, str] = {}
    for name, attempt in attempts.items():
        try:
            found[name] = attempt()
        except InputError as error:
            missing[name] = str(error)
    if not found:
        raise InputError("; ".join(f"{name}: {why}" for name, why in missing.items()))
    return found, missing
