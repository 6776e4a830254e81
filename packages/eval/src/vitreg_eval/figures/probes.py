"""Figures of what tokens hold: 5a and 5b of the paper; 6 and section 4.2.1 of the study."""

from matplotlib.figure import Figure

from vitreg_eval.analyses.kinds import ByKind, draw_kinds
from vitreg_eval.analyses.neighbours import NeighbourSimilarity, plot_neighbour_similarity
from vitreg_eval.analyses.panels import panels
from vitreg_eval.analyses.position_probe import PositionProbe, plot_position_probe
from vitreg_eval.analyses.reconstruction import (
    LinearReconstruction,
    MlpReconstruction,
    plot_reconstruction,
)
from vitreg_eval.figures.drawn import Drawing, Drawn, parts
from vitreg_eval.figures.given import Given
from vitreg_eval.figures.norms import verdicts
from vitreg_eval.metrics import Metric

PLACES = ("input", "output")


def neighbours(given: Given) -> Drawn:
    """Cosine of patches with their neighbours, at the input and at the output."""
    found: dict[str, dict[str, NeighbourSimilarity]] = {}
    missing: dict[str, str] = {}
    for place in PLACES:
        there, lost = given.evidence(f"{place}_neighbours")
        missing |= {f"{name}, {place}": why for name, why in lost.items()}
        for name, one in there.items():
            found.setdefault(name, {})[place] = one
    pictures = {
        name: Drawing(plot_neighbour_similarity(own), f"{name}: cosine of patches with their neighbours.")
        for name, own in found.items()
    }
    metrics = {name: neighbour_metrics(own, len(given.exams[0].survey)) for name, own in found.items()}
    return verdicts(given) | Drawn(pictures, {"neighbours": found}, metrics, missing)


def neighbour_metrics(found: dict[str, NeighbourSimilarity], images: int) -> dict[str, Metric]:
    """Medians and how well similarity tells outliers, as far as there are any."""
    values = {
        f"{place}_{name}": value
        for place, one in found.items()
        for name, value in (
            ("normal_median", one.normal_median),
            ("outlier_median", one.outlier_median),
            ("auroc", one.auroc),
        )
    }
    return {name: Metric(value=value, n=images) for name, value in values.items() if value is not None}


def local_information(given: Given) -> Drawn:
    """Figure 5b: position and pixels read off tokens by linear models."""
    found = parts({"position": lambda: position(given), "pixels": lambda: pixels(given)})
    return verdicts(given) | found


def position(given: Given) -> Drawn:
    """Linear probes of the position."""
    found: dict[str, PositionProbe]
    found, missing = given.evidence("position_probe")
    pictures = {
        f"position_{name}": Drawing(
            plot_position_probe(one),
            f"{name}: a linear probe names the position of a patch, on {one.test_images} images.",
        )
        for name, one in found.items()
    }
    metrics = {
        name: by_kind("position_top1", one.top1) | by_kind("position_distance", one.distance)
        for name, one in found.items()
    }
    return Drawn(pictures, {"position": found}, metrics, missing)


def pixels(given: Given) -> Drawn:
    """Linear reconstruction of the pixels."""
    found: dict[str, LinearReconstruction]
    found, missing = given.evidence("linear")
    pictures = {
        f"pixels_{name}": Drawing(
            plot_reconstruction(one), f"{name}: pixels from tokens by a linear map, on {one.test_images} images."
        )
        for name, one in found.items()
    }
    metrics = {name: by_kind("reconstruction", one.error) for name, one in found.items()}
    return Drawn(pictures, {"pixels": found}, metrics, missing)


def by_kind(name: str, found: ByKind) -> dict[str, Metric]:
    """Means of normal patches and outliers, as far as there are any."""
    kinds = {"normal": found.normal, "outlier": found.outlier}
    return {f"{name}_{kind}": mean.metric for kind, mean in kinds.items() if mean is not None}


def reconstruction(given: Given) -> Drawn:
    """Section 4.2.1 of the study: pixels from tokens by an MLP."""
    found: dict[str, MlpReconstruction]
    found, missing = given.evidence("mlp")
    pictures = {
        name: Drawing(plot_mlp(one), f"{name}: pixels from tokens by an MLP, on {one.test_images} images.")
        for name, one in found.items()
    }
    metrics = {
        name: by_kind("mse", one.error) | ({"error_ratio": one.ratio} if one.ratio is not None else {})
        for name, one in found.items()
    }
    return verdicts(given) | Drawn(pictures, {"reconstruction": found}, metrics, missing)


def plot_mlp(found: MlpReconstruction) -> Figure:
    """Squared errors of normal patches and outliers, beside those of the mean patch, on one scale."""
    figure, grid = panels(1, 2, width=3.2, height=2.8)
    ratio = "" if found.ratio is None else f", outlier / normal {found.ratio.value:.2f}"
    for axes, values, title in zip(
        grid[0], (found.error, found.reference), (f"MLP{ratio}", "mean patch (nothing known)"), strict=True
    ):
        draw_kinds(axes, values, "mean squared error")
        axes.set_title(title, fontsize=9)
    for axes in grid[0]:
        axes.set_ylim(0, max(one.get_ylim()[1] for one in grid[0]))
    return figure
