"""Figure 13 of the paper: LOST step by step."""

from functools import partial
from itertools import islice

from vitreg_core.errors import InputError

from vitreg_eval.analyses.steps import Steps, plot_steps
from vitreg_eval.config import LostOptions
from vitreg_eval.datasets import spread
from vitreg_eval.datasets.photos import PhotoSet, open_photos
from vitreg_eval.figures.drawn import Drawing, Drawn, found_of
from vitreg_eval.figures.given import Given
from vitreg_eval.lost_steps import steps_of
from vitreg_eval.models import Model
from vitreg_eval.paper import options_of
from vitreg_eval.search import Item, search_items

SHOWN = 4


def lost(given: Given) -> Drawn:
    """Score, similarity, votes, mask and box of some pictures, whole and at their own size, by every model."""
    chosen = LostOptions(images=given.options.images, test_images=SHOWN)
    options = options_of(chosen, given.options)
    found, missing = found_of({name: partial(search, model, options) for name, model in given.models.items()})
    pictures = {
        name: Drawing(plot_steps(steps), f"{name}: LOST on {options.features} of the last block, without a bias.")
        for name, steps in found.items()
    }
    arrays = {name: [without_picture(one) for one in steps] for name, steps in found.items()}
    data = photos_of(next(iter(given.models.values())), options).data
    return Drawn(pictures, arrays, missing=missing, models=given.records, data=data)


def photos_of(model: Model, options: LostOptions) -> PhotoSet:
    """The pictures to search."""
    return open_photos(model.preprocess, options)


def search(model: Model, options: LostOptions) -> list[Steps]:
    """Search a few pictures, evenly spread, and keep every step."""
    photos = photos_of(model, options).photos
    some = spread(photos, SHOWN) if isinstance(photos, list) else list(islice(photos, SHOWN))
    if not some:
        raise InputError("no pictures; give --images DIR")
    items = [Item(number, photo) for number, photo in enumerate(some)]
    finds = sorted(search_items(model, items, options), key=lambda one: one.item.number)
    return [steps_of(model, one.item, one.found[0], options) for one in finds]


def without_picture(steps: Steps) -> dict[str, object]:
    """The maps of one search."""
    return {name: value for name, value in vars(steps).items() if name != "image"}
