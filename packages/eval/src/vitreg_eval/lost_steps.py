"""How the objects of a few images were found, for the pictures."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from vitreg_core.features import Backbone
from vitreg_core.precision import use_precision

from vitreg_eval.analyses.steps import Steps, plot_steps
from vitreg_eval.config import LostOptions
from vitreg_eval.discovery import Discovery
from vitreg_eval.facets import Place, read_places
from vitreg_eval.lost import LostDiscovery, full_precision, prepare
from vitreg_eval.search import Item, padded_pixels, patch_features, search_items, unit_of_bias


def draw_steps(backbone: Backbone, items: Sequence[Item], options: LostOptions) -> Figure:
    """Search a few images again, with the options' own setting, and draw every step."""
    alone = options.model_copy(update={"sweep": False, "relative_bias": options.relative_bias or options.sweep})
    finds = sorted(search_items(backbone, items, alone), key=lambda one: one.item.number)
    return plot_steps([steps_of(backbone, one.item, one.found[0], alone) for one in finds])


def steps_of(backbone: Backbone, item: Item, found: Discovery, options: LostOptions) -> Steps:
    """The maps of one image."""
    rows, cols = found.mask.shape
    voters = similarity = None
    if isinstance(found, LostDiscovery):
        voters = np.zeros((rows, cols), dtype=bool)
        voters.flat[found.expansion.numpy()] = True
        similarity = similarity_to_seed(backbone, item, found, options)
    boxes = item.photo.boxes
    return Steps(
        image=item.photo.pixels.permute(1, 2, 0).numpy(),
        score=found.score.float().numpy(),
        similarity=similarity,
        voters=voters,
        mask=found.mask.numpy(),
        component=found.component.numpy(),
        seed=divmod(found.seed, cols),
        box=found.box,
        true=[] if boxes is None else boxes.tolist(),
    )


@torch.no_grad()
def similarity_to_seed(backbone: Backbone, item: Item, found: LostDiscovery, options: LostOptions) -> np.ndarray:
    """Dot products with the seed plus the bias, `rows cols`."""
    images = padded_pixels(backbone, item)[None].to(backbone.device)
    grid = (found.mask.shape[0], found.mask.shape[1])
    with use_precision(options.precision, backbone.device):
        place = Place(options.layer, options.features)
        [read] = read_places(backbone, images, [place], norms=options.outliers == "smooth")
    features = patch_features(read, grid)
    with full_precision(features.device.type):
        tokens = prepare(features, center=options.center, normalize=options.normalize)[0]
        similar = tokens @ tokens[found.seed] + options.bias * unit_of_bias(features, options)
    return similar.reshape(grid).cpu().numpy()
