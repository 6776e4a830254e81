import math

import pytest
from vitreg_core.errors import InputError
from vitreg_eval.analyses.carbon import Carbon, plot_carbon


def test_the_study_s_run_emits_244_kg() -> None:
    """Appendix E: 1,320 GPU-hours at 400 W and a PUE of 1.2."""
    run = Carbon(gpus=4, hours=330.0, kilowatts=0.4, pue=1.2, intensity=0.385)
    assert run.kwh == pytest.approx(633.6)
    assert round(run.kg) == 244


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gpus", 0, "gpus=0; give 1 or more"),
        ("hours", -1.0, "hours=-1.0; give a number above 0"),
        ("hours", math.inf, "hours=inf; give a number above 0"),
        ("kilowatts", 400.0, r"kilowatts=400.0; give kW per GPU, above 0 and at most 10 \(watts / 1000\)"),
        ("pue", 0.9, "pue=0.9; give 1 to 5"),
        ("pue", math.nan, "pue=nan; give 1 to 5"),
        ("intensity", 385.0, r"intensity=385.0; give kg per kWh, 0 to 2 \(grams / 1000\)"),
    ],
)
def test_factors_out_of_range_are_refused(name: str, value: float, message: str) -> None:
    factors = {"gpus": 4, "hours": 330.0, "kilowatts": 0.4, "pue": 1.2, "intensity": 0.385}
    with pytest.raises(InputError, match=message):
        Carbon(**(factors | {name: value}))


def test_the_plot_names_mass_and_energy() -> None:
    axes = plot_carbon({"run": Carbon(4, 330.0, 0.4, 1.2, 0.385), "clean": Carbon(1, 1.0, 0.4, 1.0, 0.0)}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["243.9 kg, 633.6 kWh", "0 kg, 0.4 kWh"]
