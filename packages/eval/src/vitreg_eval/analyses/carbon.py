"""What a run emits: five factors, all of them kept beside the result.

The study's own figures (appendix E) do not multiply out: 0.4 kW over 1,320 GPU-hours at a PUE of 1.2 are 633.6 kWh, not
the 580 it prints, and the intensity behind its 256 kg is not stated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure
from vitreg_core.errors import InputError

from vitreg_eval.analyses.panels import panels


@dataclass(frozen=True)
class Carbon:
    """Energy and emission of a run, and all that they follow from.

    Raises:
        InputError: a factor out of its range.
    """

    gpus: int
    """Accelerators, 1 or more."""
    hours: float
    """How long they run, above 0."""
    kilowatts: float
    """Mean draw of one accelerator, above 0 and at most 10; its rated power where none was measured."""
    pue: float
    """Energy of the whole site over that of the machines, 1 to 5."""
    intensity: float
    """Kilograms of CO2 equivalent per kWh, 0 to 2."""

    def __post_init__(self) -> None:
        """Check all factors."""
        check("gpus", self.gpus, self.gpus >= 1, "1 or more")
        check("hours", self.hours, self.hours > 0, "a number above 0")
        check(
            "kilowatts", self.kilowatts, 0 < self.kilowatts <= 10, "kW per GPU, above 0 and at most 10 (watts / 1000)"
        )
        check("pue", self.pue, 1 <= self.pue <= 5, "1 to 5")
        check("intensity", self.intensity, 0 <= self.intensity <= 2, "kg per kWh, 0 to 2 (grams / 1000)")

    @property
    def kwh(self) -> float:
        """Energy in kWh, that of the site included."""
        return self.gpus * self.hours * self.kilowatts * self.pue

    @property
    def kg(self) -> float:
        """Emission in kilograms of CO2 equivalent."""
        return self.kwh * self.intensity


def check(name: str, value: int | float, fits: bool, wanted: str) -> None:  # noqa: FBT001
    """Refuse a factor that does not fit, infinite ones included."""
    if not fits or not math.isfinite(value):
        raise InputError(f"{name}={value}; give {wanted}")


def plot_carbon(runs: Mapping[str, Carbon]) -> Figure:
    """A bar per run in kg, with its energy."""
    figure, grid = panels(1, 1, width=5.0, height=0.9 + 0.4 * len(runs))
    axes = grid[0, 0]
    bars = axes.barh(list(runs), [run.kg for run in runs.values()], color="#1f77b4")
    axes.bar_label(bars, [f"{run.kg:,.4g} kg, {run.kwh:,.4g} kWh" for run in runs.values()], padding=3, fontsize=7)
    axes.set_xlim(0, 1.7 * max(max(run.kg for run in runs.values()), 1e-9))
    axes.invert_yaxis()
    axes.set_xlabel("kg of CO2 equivalent")
    return figure
