"""Methods of object discovery by name, behind one interface: a view of one image in, one box and its story out.

    METHODS["tokencut"].find(View(grid=..., patch_size=..., image_size=..., features=keys), tau=0.2)

Each takes keyword settings of its own (`Method.settings` lists them with their defaults) and refuses a view that
lacks what it needs. A failed search counts as a miss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Literal

from vitreg_eval.baselines import center_box, first_component, full_box, random_box
from vitreg_eval.dino_seg import dino_seg
from vitreg_eval.discovery import Discovery
from vitreg_eval.lost import lost
from vitreg_eval.tokencut import tokencut


@dataclass(frozen=True)
class Method:
    """One way to find an object in one image."""

    find: Callable[..., Discovery]
    """Called with a `View` and, by keyword, any of the settings."""
    needs: Literal["features", "attention", "nothing"]
    """Which part of the view must be there: patch features, the class token's attention, or sizes and name alone."""

    @property
    def settings(self) -> dict[str, object]:
        """Keyword settings and their defaults."""
        parameters = signature(self.find).parameters.values()
        return {
            parameter.name: parameter.default for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY
        }


METHODS: dict[str, Method] = {
    "lost": Method(lost, "features"),
    "tokencut": Method(tokencut, "features"),
    "dino_seg": Method(dino_seg, "attention"),
    "pca": Method(first_component, "features"),
    "full": Method(full_box, "nothing"),
    "center": Method(center_box, "nothing"),
    "random": Method(random_box, "nothing"),
}
"""LOST, TokenCut and DINO-seg are published; pca, full, center and random are ours, to compare with."""
