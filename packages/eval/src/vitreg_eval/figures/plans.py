"""Every figure: what it needs, and what draws it. Its published values are in `published_figures.py`."""

from collections.abc import Callable
from dataclasses import dataclass

from vitreg_eval.figures import costs, curves, maps, norms, objects, probes, training
from vitreg_eval.figures.drawn import Drawn
from vitreg_eval.figures.given import Given

IMAGES = "models and images"
SNAPSHOTS = "snapshots and images"
BOTH = "models or snapshots, and images"
MODELS = "models"
NOTHING = "nothing"


@dataclass(frozen=True)
class Plan:
    """How a figure is made."""

    needs: str
    """What is looked at before it can be drawn."""
    draw: Callable[[Given], Drawn]
    """Raises InputError where there is nothing to draw."""

    @property
    def looks_with_models(self) -> bool:
        """Whether every model has to see the images first."""
        return self.needs in (IMAGES, BOTH)

    @property
    def looks_with_snapshots(self) -> bool:
        """Whether every snapshot has to see the images first."""
        return self.needs in (SNAPSHOTS, BOTH)


PLANS: dict[str, Plan] = {
    "fig1": Plan(IMAGES, maps.enlarged),
    "fig2": Plan(IMAGES, maps.attention),
    "fig3": Plan(IMAGES, norms.maps_and_histogram),
    "fig4a": Plan(IMAGES, norms.blocks),
    "fig4b": Plan(SNAPSHOTS, training.norms),
    "fig4c": Plan(IMAGES, norms.sizes),
    "fig5a": Plan(IMAGES, probes.neighbours),
    "fig5b": Plan(IMAGES, probes.local_information),
    "fig6": Plan(NOTHING, costs.architecture),
    "fig7": Plan(IMAGES, norms.with_and_without),
    "fig8": Plan(IMAGES, curves.attention_and_accuracy),
    "fig9": Plan(IMAGES, maps.registers),
    "fig10": Plan(IMAGES, norms.positions),
    "fig11": Plan(NOTHING, costs.gradients),
    "fig12": Plan(NOTHING, costs.growth),
    "fig13": Plan(MODELS, objects.lost),
    "fig14": Plan(IMAGES, maps.many),
    "fig15": Plan(IMAGES, maps.components),
    "fig16": Plan(IMAGES, norms.norm_maps),
    "study_fig1": Plan(IMAGES, maps.by_peakiness),
    "study_fig4": Plan(IMAGES, norms.histograms),
    "study_fig5": Plan(IMAGES, norms.blocks),
    "study_fig6": Plan(IMAGES, probes.neighbours),
    "study_fig7": Plan(IMAGES, maps.by_registers_and_peakiness),
    "study_fig8": Plan(BOTH, training.blocks_and_training),
    "study_fig9": Plan(SNAPSHOTS, training.strips),
    "study_fig10": Plan(IMAGES, maps.focus),
    "study_fig11": Plan(SNAPSHOTS, training.likeness),
    "study_reconstruction": Plan(IMAGES, probes.reconstruction),
    "study_carbon": Plan(NOTHING, costs.carbon),
}
