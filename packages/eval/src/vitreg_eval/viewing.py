"""What the viewer shows: maps of one picture in one block of each model, computed once and kept."""

import copy
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from vitreg_core.errors import InputError
from vitreg_core.test_time import find_register_neurons, with_test_time_registers

from vitreg_eval.lru import Cache
from vitreg_eval.models import Model
from vitreg_eval.viewing_maps import Look, Maps, attention_map, look_into, make_maps, similarity_map
from vitreg_eval.viewing_pictures import Picture, Pictures

CALIBRATION_PICTURES = 64
"""Pictures on which register neurons are found: enough for clear outliers, and soon done."""


class Choice(NamedTuple):
    """What a reader wants to see."""

    layer: int
    """Block, from 0; a model with fewer blocks shows its last."""
    head: int | None
    """Attention head, from 0; None is the mean over heads."""
    token: str
    """Whose attention: `cls`, `register 0` and so on, or `patch` for the clicked one."""
    patch: tuple[float, float]
    """The clicked place, as parts of height and width, 0 to 1."""
    test_time: bool = False
    """Whether models get test-time registers."""


@dataclass(frozen=True, eq=False)
class View:
    """One model on one picture."""

    name: str
    layer: int
    """Block that is shown, from 0."""
    patch: tuple[int, int]
    """Row and column of the clicked patch."""
    attention: Float[np.ndarray, "rows cols"] | None
    """From the chosen token to the patches, summing to 1; None where the model lacks the token or the head."""
    missing: str
    """Why there is no attention map."""
    similarity: Float[np.ndarray, "rows cols"]
    """Cosine of each patch after the block to the clicked one, -1 to 1."""
    maps: Maps


@dataclass(frozen=True)
class Mended:
    """A model with test-time registers."""

    model: Model
    """The model itself where there was nothing to mend, or no way."""
    verdict: str
    """What was found, or why nothing was done."""


class Viewer:
    """Models, and what they make of pictures. Safe to use from several threads.

    Passes run one at a time: they use all cores, and what is captured belongs to one picture.
    """

    def __init__(self, models: Sequence[Model], folder: Path | None = None, *, most: int = 2**29) -> None:
        """Args: models to compare; a folder of pictures to offer; bytes of features to keep.

        Raises:
            InputError: a model that does not say how to prepare images, or a folder without any.
        """
        self.models = tuple(models)
        self.names = short_names([model.source for model in models])
        self.pictures = Pictures([model.preprocess for model in models], folder)
        self.looks: Cache[Look] = Cache(most)
        self.maps: Cache[Maps] = Cache(most // 8)
        self.passes = Lock()
        self.searches = Lock()
        self.search = ThreadPoolExecutor(1)
        self.mended: dict[int, Future[Mended]] = {}

    def view(self, key: str, choice: Choice) -> list[View]:
        """What each model shows of a picture.

        Raises:
            InputError: a picture that cannot be opened, or features that are not finite.
        """
        picture = self.pictures.open(key)
        return [self.view_of(index, picture, choice) for index in range(len(self.models))]

    def find_mended(self) -> list[Future[Mended]]:
        """Start to find each model's test-time registers where that was not done before; returns at once."""
        with self.searches:
            for index in range(len(self.models)):
                if index not in self.mended:
                    self.mended[index] = self.search.submit(self.mend, index)
            return [self.mended[index] for index in range(len(self.models))]

    def model(self, index: int, *, test_time: bool) -> Model:
        """A model as it is, or with test-time registers, which may take minutes to find the first time."""
        return self.find_mended()[index].result().model if test_time else self.models[index]

    def registers(self, *, test_time: bool) -> int:
        """The largest number of registers of a model, those of test time included."""
        models = (self.model(index, test_time=test_time) for index in range(len(self.models)))
        return max(model.num_registers for model in models)

    def mend(self, index: int) -> Mended:
        """Find the register neurons of a model, on a copy of it, so that others may look at it meanwhile."""
        model = self.models[index]
        try:
            images = self.pictures.calibration(index, CALIBRATION_PICTURES)
            neurons = find_register_neurons(copy.deepcopy(model), images)
            if not neurons.neurons:
                return Mended(model, neurons.verdict)
            return Mended(with_test_time_registers(model, neurons), neurons.verdict)
        except InputError as error:
            return Mended(model, str(error))

    def view_of(self, index: int, picture: Picture, choice: Choice) -> View:
        """What one model shows."""
        model = self.model(index, test_time=choice.test_time)
        layer = min(choice.layer, model.depth - 1)
        look, maps = self.look(index, picture, layer, test_time=choice.test_time)
        rows, cols = maps.norms.shape
        place = min(int(choice.patch[0] * rows), rows - 1), min(int(choice.patch[1] * cols), cols - 1)
        attention = attention_map(look, model, choice.token, choice.head, place, (rows, cols))
        return View(
            name=self.names[index],
            layer=layer,
            patch=place,
            attention=attention if isinstance(attention, np.ndarray) else None,
            missing=attention if isinstance(attention, str) else "",
            similarity=similarity_map(look.tokens[model.num_prefix_tokens :], place, (rows, cols)),
            maps=maps,
        )

    def look(self, index: int, picture: Picture, layer: int, *, test_time: bool) -> tuple[Look, Maps]:
        """What a block holds, from memory or by a pass."""
        model = self.model(index, test_time=test_time)
        kind = (index, model is not self.models[index], picture.key)
        look, maps = self.looks.get((*kind, layer)), self.maps.get((*kind, layer))
        if look is not None and maps is not None:
            return look, maps
        with self.passes:
            look = self.looks.get((*kind, layer))  # which another thread may have put there meanwhile
            if look is None:
                seen = look_into(model, picture.inputs[index], layer)
                for block, one in seen.items():
                    self.looks.put((*kind, block), one)
                look = seen[layer]
            maps = make_maps(model, look, self.pictures.pixels(picture, index))
            self.maps.put((*kind, layer), maps)
        return look, maps


def short_names(sources: Sequence[str]) -> list[str]:
    """What a reader calls each model: the last part of where it comes from, or all of it where these are alike.

    Raises:
        InputError: the same model twice.
    """
    if len(set(sources)) < len(sources):
        raise InputError(f"{sources[0]} is given twice; give two different models")
    names = [Path(source).name or source for source in sources]
    return names if len(set(names)) == len(names) else list(sources)
