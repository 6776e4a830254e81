"""Figures that need no images: 11 and 12 of the paper; the carbon estimate of the study."""

from collections.abc import Callable
from typing import TypeVar

from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer

from vitreg_eval.analyses.carbon import Carbon, plot_carbon
from vitreg_eval.analyses.position_gradient import (
    PositionGradient,
    model_position_gradient,
    plot_position_gradients,
    position_gradient,
)
from vitreg_eval.analyses.register_cost import RegisterCost, plot_register_cost, register_cost
from vitreg_eval.figures.drawn import Drawing, Drawn, wrapped
from vitreg_eval.figures.given import Given
from vitreg_eval.metrics import Metric
from vitreg_eval.models import Model

T = TypeVar("T")

STORED, RESIZED = (16, 16), (7, 7)
"""Grids of the paper's figure 11."""
WIDTH = 6.4
"""Inches of figure 12, with room for names at its right."""
PAPER_NAME, PAPER_PRESET = "ViT-L/14 (paper)", "vit_l14"
STUDY = Carbon(gpus=4, hours=330.0, kilowatts=0.4, pue=1.2, intensity=256.4 / 580)
"""Factors of the study (appendix E, table 6); the intensity is that behind its kg at its kWh."""


def architecture(given: Given) -> Drawn:  # noqa: ARG001 (as every figure)
    """Figure 6 is no result.

    Raises:
        InputError: always.
    """
    raise InputError("a drawing of where registers join the sequence, with nothing to compute")


def shapes(model: Model) -> VisionTransformer:
    """A model whose shapes are known.

    Raises:
        InputError: a model in the class of another library.
    """
    if not isinstance(model, VisionTransformer):
        raise InputError("runs in the class of its own library, whose shapes are not known")
    return model


def gradients(given: Given) -> Drawn:
    """Figure 11: what a resize of the positions reads, with and without antialias, and by every model."""
    named = {
        "no antialias": position_gradient(STORED, RESIZED, antialias=False),
        "antialias": position_gradient(STORED, RESIZED, antialias=True),
        "no antialias, offset 0.1": position_gradient(STORED, RESIZED, antialias=False, offset=0.1),
    }
    found, missing = of_models(given, gradient_of)
    pictures = {"paper": Drawing(plot_position_gradients(list(named.values())), "The resizes of the paper.")}
    if found:
        caption = f"Resizes of the models, from their own grids: {', '.join(found)}."
        pictures["models"] = Drawing(plot_position_gradients(list(found.values())), caption)
    everything = {**named, **found}
    metrics = {name: {"negative_share": Metric(value=one.negative_share, n=0)} for name, one in everything.items()}
    sums = {name: {"gradient": one, "column_sums": one.column_sums} for name, one in everything.items()}
    return Drawn(pictures, sums, metrics, missing, given.records if found else {})


def gradient_of(model: Model) -> PositionGradient:
    """Gradient of the positions of a model.

    Raises:
        InputError: a model without stored positions.
    """
    config = shapes(model).config
    if config.position != "learned":
        raise InputError("has rotary positions, of which none are stored")
    return model_position_gradient(config, RESIZED)


def of_models(given: Given, look: Callable[[Model], T]) -> tuple[dict[str, T], dict[str, str]]:
    """What holds of each model, and why it is not known of some; nothing where no model is given."""
    if not given.options.model:
        return {}, {"your models": "give --model SOURCE"}
    found: dict[str, T] = {}
    missing: dict[str, str] = {}
    for name, model in given.models.items():
        try:
            found[name] = look(model)
        except InputError as error:
            missing[name] = str(error)
    return found, missing


def growth(given: Given) -> Drawn:
    """Figure 12: what registers add to parameters and FLOPs."""
    found, missing = of_models(given, cost_of)
    costs = {PAPER_NAME: register_cost(PAPER_PRESET)} | found
    figure = plot_register_cost({wrapped(name): one for name, one in costs.items()})
    figure.set_figwidth(WIDTH)
    figure.axes[0].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    drawing = Drawing(figure, "Growth over the same model without registers.")
    metrics = {name: cost_metrics(one) for name, one in costs.items()}
    models = given.records if found else {}
    return Drawn({"growth": drawing}, {"costs": costs}, metrics, missing, models)


def cost_of(model: Model) -> RegisterCost:
    """What registers add to a model."""
    return register_cost(shapes(model).config)


def cost_metrics(found: RegisterCost) -> dict[str, Metric]:
    """Growth at the numbers of registers that the paper speaks of."""
    kinds = {"flops": found.flops, "parameters": found.parameters}
    return {
        f"{kind}_growth_reg{count}": Metric(value=float(values[list(found.counts).index(count)]), n=0)
        for kind, values in kinds.items()
        for count in (4, 16)
    }


def carbon(given: Given) -> Drawn:
    """Energy and emission of the study's trainings by its factors, and of one's own training."""
    runs, missing = {"study, multiplied out": STUDY}, {}
    options = given.options
    if options.hours is None:
        missing["a training of yours"] = "give --hours, and --gpus, --kilowatts, --pue, --intensity"
    else:
        runs["yours"] = Carbon(options.gpus, options.hours, options.kilowatts, options.pue, options.intensity)
    metrics = {name: {"kwh": Metric(value=run.kwh, n=0), "kg": Metric(value=run.kg, n=0)} for name, run in runs.items()}
    arrays = {name: {"factors": run, "kwh": run.kwh, "kg": run.kg} for name, run in runs.items()}
    return Drawn(
        {"carbon": Drawing(plot_carbon(runs), "GPUs x hours x kW x PUE x intensity.")}, arrays, metrics, missing
    )
