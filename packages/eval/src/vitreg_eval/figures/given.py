"""What figures are made from: models, images and snapshots, each part when it is first asked for, once for all figures.

Models are opened and images looked at once, also for many figures; of a snapshot, what was seen of the images stays and
the model does not.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from numpy import ndarray
from vitreg_core.config import override
from vitreg_core.data.images import Preprocess
from vitreg_core.errors import InputError
from vitreg_core.weights.files import weights_hash

from vitreg_eval.analyses.norms import worst_images
from vitreg_eval.config import NormsOptions
from vitreg_eval.config.paper import PaperOptions
from vitreg_eval.datasets import TolerantSet, scenes, tolerant_folder
from vitreg_eval.exam import Exam, sample_size
from vitreg_eval.figures.drawn import found_of
from vitreg_eval.figures.snapshots import Training, find_trainings
from vitreg_eval.measuring import device
from vitreg_eval.models import Model, open_model
from vitreg_eval.paper import options_of
from vitreg_eval.results import DataRecord, ModelRecord
from vitreg_eval.survey import NAMED, Survey, survey

ATTRIBUTES = {
    "positions": "outlier positions",
    "input_neighbours": "neighbour similarity at the input",
    "output_neighbours": "neighbour similarity at the output",
    "focus": "positional focus",
    "register_similarity": "similarity of register maps",
    "position_probe": "position probe",
    "linear": "linear reconstruction",
    "mlp": "reconstruction by an MLP",
    "components": "first principal component",
}
"""Analyses of an exam, and what it calls them where it tells why one is missing."""


T = TypeVar("T")


def once(compute: Callable[["Given"], T]) -> "cached_property[T]":
    """Make a method an attribute that is computed once, and that fails at once where it has failed before."""

    def attempt(given: "Given") -> T:
        if compute.__name__ in given.failed:
            raise given.failed[compute.__name__]
        try:
            return compute(given)
        except InputError as error:
            given.failed[compute.__name__] = error
            raise

    return cached_property(attempt)


@dataclass(frozen=True)
class Seen:
    """What was seen of the images by one snapshot."""

    step: int
    record: ModelRecord
    survey: Survey


@dataclass(frozen=True)
class History:
    """A training, and what its snapshots saw of the same images."""

    training: Training
    preprocess: Preprocess
    """Of the first snapshot."""
    seen: tuple[Seen, ...]
    """By increasing step."""

    @property
    def records(self) -> dict[str, ModelRecord]:
        """What was looked at, by name."""
        return {f"{self.training.name}, step {one.step}": one.record for one in self.seen}

    @property
    def data(self) -> DataRecord:
        """The images."""
        return self.seen[0].survey.images.images.data

    def picture(self, index: int) -> Float[ndarray, "height width 3"]:
        """Pixels in 0 to 1 of one of the images that `survey.spread` gives."""
        found = self.seen[0].survey
        row = int(found.chosen[index])
        [image] = next(found.images.images.batches(row, row + 1)).images
        return self.preprocess.denormalize(image).clamp(0, 1).permute(1, 2, 0).numpy()


class Given:
    """What the options give.

    Every part raises InputError where it is asked for and was not given.
    """

    def __init__(self, options: PaperOptions, records: Path) -> None:
        """Load nothing yet.

        Args:
            options: of the command.
            records: folder for what is kept of the images where there is no cache.
        """
        self.options = options
        self.folder = records
        self.failed: dict[str, InputError] = {}
        chosen = NormsOptions(images=options.images, limit=options.limit, test_images=options.test_images)
        self.task = options_of(chosen, options)

    @once
    def models(self) -> dict[str, Model]:
        """The models on their device, by the name that a reader sees."""
        if not self.options.model:
            raise InputError("no model is given; give --model SOURCE")
        where = device(self.task)
        names = names_of(self.options.model)
        return {name: open_model(source).to(where) for name, source in zip(names, self.options.model, strict=True)}

    @once
    def records(self) -> dict[str, ModelRecord]:
        """Source and hash of every model."""
        return {name: record_of(model) for name, model in self.models.items()}

    @once
    def exams(self) -> list[Exam]:
        """Every model on the images."""
        images = {name: self.images(model.preprocess) for name, model in self.models.items()}
        found = {name: survey(model, images[name], self.task, self.folder) for name, model in self.models.items()}
        count = min(sample_size(self.models[name], one) for name, one in found.items())
        return [Exam(name, self.models[name], one, self.task, count) for name, one in found.items()]

    @once
    def histories(self) -> list[History]:
        """Every training with two or more snapshots, on the images."""
        return [self.history(one) for one in find_trainings(self.options.model, self.options.snapshots)]

    def history(self, training: Training) -> History:
        """One snapshot after another; of each model only what it saw stays."""
        seen, preprocess = [], None
        for one in training.snapshots:
            model = open_model(str(one.folder)).to(device(self.task))
            preprocess = preprocess or model.preprocess
            found = survey(model, self.images(preprocess), self.task, self.folder)
            seen.append(Seen(one.step, record_of(model), found))
        assert preprocess is not None
        return History(training, preprocess, tuple(seen))

    def images(self, preprocess: Preprocess) -> TolerantSet:
        """The photos of the options, or drawn scenes."""
        task = self.task
        if task.images is None:
            return TolerantSet(scenes(preprocess, task.test_images, task.seed, "test"), [])
        return tolerant_folder(preprocess, task.images, task.limit, task.batch_size)

    def enlarged(self, model: Model, factor: int) -> TolerantSet:
        """The same images at a multiple of the size that a model reads."""
        config = model.preprocess.config
        return self.images(Preprocess(override(config, {"image_size": factor * config.image_size})))

    @property
    def unreadable(self) -> dict[str, str]:
        """Images that the models looked at and that cannot be read; nothing before they have looked."""
        names = self.exams[0].survey.unreadable if "exams" in vars(self) else []
        return {"images": f"{len(names)} cannot be read, such as {', '.join(names[:NAMED])}"} if names else {}

    @property
    def data(self) -> DataRecord:
        """The images that the models were examined on."""
        return self.exams[0].survey.images.images.data

    def shown(self, count: int) -> list[int]:
        """Images of the sample to show: from most to fewest outliers of the first model, evenly spread."""
        first = self.exams[0]
        return worst_images(first.sample.outliers, first.sample.norms[:, -1], count)

    def with_maps(self) -> tuple[dict[str, Exam], dict[str, str]]:
        """Exams of the models that show their attention, and why the others do not."""

        def look(exam: Exam) -> Exam:
            exam.need("attention")
            return exam

        return found_of({exam.name: partial(look, exam) for exam in self.exams})

    def evidence(self, attribute: str) -> tuple[dict[str, Any], dict[str, str]]:
        """An analysis of every model, and why it is missing for some.

        Raises:
            InputError: it is for all.
        """

        def look(exam: Exam) -> object:
            found = getattr(exam, attribute)
            if found is None:
                raise InputError(exam.missing[ATTRIBUTES[attribute]])
            return found

        return found_of({exam.name: partial(look, exam) for exam in self.exams})


def record_of(model: Model) -> ModelRecord:
    """Source and hash of a model."""
    return ModelRecord(source=model.source, hash=weights_hash(model))


def names_of(sources: Sequence[str]) -> list[str]:
    """Last parts of sources, as far as they tell them apart; else whole ones, and numbers for equal ones."""
    short = [Path(source).name or source for source in sources]
    counts = Counter(short)
    named = [one if counts[one] == 1 else source for one, source in zip(short, sources, strict=True)]
    return [name if named.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(named)]
