"""One model on one set of images: the verdict on all of them, and evidence, each piece computed when asked for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from vitreg_core.capturing import capture
from vitreg_core.data.scenes import TEXTURES
from vitreg_core.denoise import Denoised
from vitreg_core.errors import InputError
from vitreg_core.outliers import mark_outliers
from vitreg_core.precision import use_precision
from vitreg_core.register_neurons import RegisterNeurons
from vitreg_core.test_time import find_register_neurons

from vitreg_eval.analyses.complexity import (
    ComplexityRelation,
    artifact_scores,
    picture_complexity,
    relate_to_complexity,
)
from vitreg_eval.analyses.components import ComponentMaps, component_maps, first_component, patch_scatter
from vitreg_eval.analyses.facet_norms import FacetNorms, facet_norms
from vitreg_eval.analyses.focus import Focus, focus_sums, positional_focus
from vitreg_eval.analyses.massive import BlockActivations, MassiveActivations
from vitreg_eval.analyses.neighbours import NeighbourSimilarity, similarity_by_kind
from vitreg_eval.analyses.outlier_positions import OutlierPositions, outlier_positions
from vitreg_eval.analyses.overlap import ClassOverlap, MapOverlap, map_overlap, overlap_by_class
from vitreg_eval.analyses.position_probe import PositionProbe, probe_positions
from vitreg_eval.analyses.reconstruction import (
    LinearReconstruction,
    MlpReconstruction,
    patchify,
    reconstruct_by_mlp,
    reconstruct_linearly,
)
from vitreg_eval.analyses.register_similarity import MapSimilarity, map_similarity, similarity_sums
from vitreg_eval.analyses.replacement import ReplacementAudit, audit_registers
from vitreg_eval.config import TaskOptions
from vitreg_eval.diagnosis import Diagnosis, diagnose_survey
from vitreg_eval.models import Model
from vitreg_eval.survey import FACETS, Survey
from vitreg_eval.tokens import Wanted, run

SAMPLE = 256
"""Images of the sample, at most."""
NUMBERS = 2**26
"""Numbers that the pixels and the tokens of the sample may have, each."""
CALIBRATION = 128
"""Images that register neurons are found on."""
FEW = 64
"""Images for what keeps all tokens of all blocks."""

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Images that are looked at more closely, in memory."""

    rows: Int[Tensor, " n"]
    """Their indices in the survey."""
    images: Float[Tensor, "n 3 height width"]
    """Normalised as the model reads them."""
    norms: Float[Tensor, "n depth p"]
    outliers: Bool[Tensor, "n p"]
    """After the block that the diagnosis judges."""


def picture_of(model: Model, image: Float[Tensor, "3 height width"]) -> Float[np.ndarray, "height width 3"]:
    """Pixels in 0 to 1 of a normalised image."""
    return model.preprocess.denormalize(image).clamp(0, 1).permute(1, 2, 0).numpy()


def no_outliers(what: str) -> InputError:
    """What is told where there is nothing to analyse."""
    return InputError(f"no outlier mode, so there are no {what}")


def sample_size(model: Model, found: Survey) -> int:
    """How many images of a survey fit into a sample."""
    size = model.preprocess.config.image_size
    patches = found.grid[0] * found.grid[1]
    fits = min(NUMBERS // (3 * size * size), NUMBERS // (patches * model.embed_dim))
    return max(1, min(SAMPLE, fits, len(found)))


def analysis(name: str) -> Callable[[Callable[["Exam"], T]], "cached_property[T | None]"]:
    """Make a method an attribute that is computed once; None, with the reason in `missing`, where it is impossible."""

    def wrap(compute: Callable[["Exam"], T]) -> "cached_property[T | None]":
        def attempt(exam: "Exam") -> T | None:
            try:
                return compute(exam)
            except InputError as error:
                exam.missing[name] = str(error)
                return None

        return cached_property(attempt)

    return wrap


@dataclass(frozen=True)
class Exam:
    """One model on one set of images."""

    name: str
    """What a reader calls the model."""
    model: Model
    survey: Survey
    options: TaskOptions
    """Precision, batch size and seed."""
    sample_images: int
    """Images of the sample, as `sample_size` counts them."""
    missing: dict[str, str] = field(default_factory=dict)
    """Analyses that the model or the images do not allow, and why; those that were asked for."""

    def gather(self) -> None:
        """Run every analysis, with a progress bar on a terminal."""
        with tqdm(ANALYSES, desc=f"analyses of {self.name}", unit="analysis", disable=None, leave=False) as bar:
            for name in bar:
                bar.set_postfix_str(name)
                getattr(self, name)

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """The verdict on all images."""
        return diagnose_survey(self.survey)

    @cached_property
    def outliers(self) -> Bool[Tensor, "few p"]:
        """Outliers after the judged block in the images that `survey.spread` gives."""
        return mark_outliers(self.survey.spread("norms")[:, self.diagnosis.block], self.diagnosis.judged.cut)

    @cached_property
    def sample(self) -> Sample:
        """Images evenly spread over the survey; of drawn ones the first, since they come in no order."""
        found, image_set, count = self.survey, self.survey.images.images, self.sample_images
        if found.images.names:
            rows = found.there[torch.arange(count) * len(found) // count]
            images = torch.cat([next(image_set.batches(row, row + 1)).images for row in rows.tolist()])
        else:
            rows = torch.arange(count)
            images = torch.cat([batch.images for batch in image_set.batches(0, count)])
        norms = found.store.rows("norms", rows)
        return Sample(rows, images, norms, mark_outliers(norms[:, self.diagnosis.block], self.diagnosis.judged.cut))

    @cached_property
    def patches(self) -> Float[Tensor, "n p d"]:
        """Patch tokens of the sample after the final norm."""
        return self.tokens(norm=True)

    def tokens(self, *, norm: bool) -> Float[Tensor, "n p d"]:
        """Patch tokens of the sample after the last block, with or without the final norm."""
        wanted = Wanted(parts=("patches",), norm=norm)
        batches = self.sample.images.split(self.options.batch_size)
        parts = [run(self.model, batch, self.options.precision, wanted)[0]["patches"] for batch in batches]
        return torch.cat([part[:, 0].float().cpu() for part in parts])

    def picture(self, index: int) -> Float[np.ndarray, "height width 3"]:
        """Pixels in 0 to 1 of an image of the sample."""
        return picture_of(self.model, self.sample.images[index])

    @cached_property
    def pixels(self) -> Float[Tensor, "n p values"]:
        """Patches of the sample."""
        return patchify(self.sample.images, self.model.patch_size)

    @property
    def prefix_names(self) -> list[str]:
        """Names of the tokens before the patches."""
        first = self.survey.prefix.count("cls")
        return [*["cls"] * first, *(f"register {index}" for index in range(len(self.survey.prefix) - first))]

    def kinds(self) -> dict[str, Float[np.ndarray, " n"]]:
        """Norms after the judged block by kind of token: patches, class token, each register."""
        block = self.diagnosis.block
        named = {"patches": self.survey.spread("norms")[:, block].flatten().numpy()}
        values = self.survey.spread("prefix_norms")[:, block]
        return named | {name: values[:, index].numpy() for index, name in enumerate(self.prefix_names)}

    def maps(self) -> Iterator[Float[Tensor, "b m rows cols"]]:
        """Attention maps of class token and registers, of all images in pieces.

        Raises:
            InputError: the model has no such tokens, or does not show its attention.
        """
        if not self.survey.prefix:
            raise InputError("a model without class token and registers: where its patches look is shown instead")
        self.need("attention")
        return self.survey.pieces("attention")

    def one_pass(self) -> Model:
        """The model, of which one forward pass can be seen from inside.

        Raises:
            InputError: its features are averages of several.
        """
        if isinstance(self.model, Denoised):
            raise InputError("averaged features have no inside of their own; see the model before")
        return self.model

    def need(self, part: str) -> None:
        """Refuse what the model does not show.

        Raises:
            InputError: as the model said.
        """
        if part in self.survey.missing:
            raise InputError(self.survey.missing[part])

    @analysis("outlier positions")
    def positions(self) -> OutlierPositions:
        """Where in the image outliers are; of all images."""
        if not self.diagnosis.judged.found:
            raise no_outliers("positions of outliers")
        block, cut = self.diagnosis.block, self.diagnosis.judged.cut
        marked = [mark_outliers(norms[:, block], cut) for norms in self.survey.pieces("norms")]
        return outlier_positions(torch.cat(marked), self.survey.grid, seed=self.options.seed)

    @analysis("neighbour similarity at the input")
    def input_neighbours(self) -> NeighbourSimilarity:
        """Likeness of neighbours among the patch embeddings before positions."""
        self.need("embeddings")
        return similarity_by_kind(self.survey.spread("input_similarity"), self.outliers)

    @analysis("neighbour similarity at the output")
    def output_neighbours(self) -> NeighbourSimilarity:
        """Likeness of neighbours after the final norm."""
        return similarity_by_kind(self.survey.spread("output_similarity"), self.outliers)

    @analysis("norms of queries, keys and values")
    def facets(self) -> list[FacetNorms]:
        """Norms of queries, keys and values per head."""
        self.need("facets")
        norms = self.survey.spread("facet_norms")
        return facet_norms({name: norms[:, index] for index, name in enumerate(FACETS)}, self.outliers)

    @analysis("positional focus")
    def focus(self) -> Focus:
        """Where class token and registers look on average; of all images."""
        return positional_focus(reduce(add, map(focus_sums, self.maps())), class_token="cls" in self.survey.prefix)

    @analysis("similarity of register maps")
    def register_similarity(self) -> MapSimilarity:
        """How alike the maps of class token and registers are; of all images."""
        if len(self.survey.prefix) < 2:
            raise InputError("one map alone, or none: nothing to compare it with")
        sums = reduce(add, map(similarity_sums, self.maps()))
        return map_similarity(sums, class_token="cls" in self.survey.prefix)

    @analysis("overlap of maps with objects")
    def overlap(self) -> MapOverlap:
        """How well the maps of class token and registers cover objects; of the sample, where masks are known."""
        objects = F.avg_pool2d(self.masks().gt(0).float()[:, None], self.model.patch_size)[:, 0] > 0.5
        maps = self.survey.store.rows("attention", self.sample.rows)
        return map_overlap(maps, objects, class_token="cls" in self.survey.prefix, seed=self.options.seed)

    @analysis("overlap of maps with classes")
    def class_overlap(self) -> ClassOverlap:
        """How well each map covers the patches of each texture, by the pixel in the middle of a patch; as `overlap`."""
        half, side = self.model.patch_size // 2, self.model.patch_size
        rows, cols = self.survey.grid
        classes = self.masks()[:, half::side, half::side][:, :rows, :cols]
        maps = self.survey.store.rows("attention", self.sample.rows)
        return overlap_by_class(maps, classes, dict(enumerate(TEXTURES, 1)), class_token="cls" in self.survey.prefix)

    def masks(self) -> Int[Tensor, "n height width"]:
        """Class of every pixel of the sample, 0 for none.

        Raises:
            InputError: photos, whose objects nobody has marked; no maps to hold against them.
        """
        self.need("attention")
        if self.survey.images.names or not self.survey.prefix:
            raise InputError("needs the masks of objects, as drawn scenes have them, and a class token or registers")
        batches = self.survey.images.images.batches(0, self.sample_images)
        return torch.cat([batch.targets["mask"] for batch in batches]).long()

    @analysis("position probe")
    def position_probe(self) -> PositionProbe:
        """What tokens know of their position."""
        sample = self.sample
        return probe_positions(self.patches, sample.outliers, self.survey.grid, seed=self.options.seed)

    @analysis("linear reconstruction")
    def linear(self) -> LinearReconstruction:
        """What a linear map makes of tokens."""
        sample = self.sample
        return reconstruct_linearly(self.patches, self.pixels, sample.outliers, seed=self.options.seed)

    @analysis("reconstruction by an MLP")
    def mlp(self) -> MlpReconstruction:
        """What the study's MLP makes of tokens."""
        sample = self.sample
        return reconstruct_by_mlp(self.patches, self.pixels, sample.outliers, seed=self.options.seed)

    @analysis("image complexity")
    def complexity(self) -> list[ComplexityRelation]:
        """Artifact score against the complexity of the pictures."""
        pixels = ((255 * picture_of(self.model, image)).round().astype(np.uint8) for image in self.sample.images)
        measured = [picture_complexity(picture) for picture in pixels]
        scores = artifact_scores(self.sample.norms[:, self.diagnosis.block], self.sample.outliers)
        return relate_to_complexity(scores.max_over_median, measured, seed=self.options.seed)

    @analysis("first principal component")
    def components(self) -> ComponentMaps:
        """The first principal component of the patches of the sample, before the final norm, which hides outliers."""
        patches = self.tokens(norm=False)
        sums = reduce(add, map(patch_scatter, patches.split(FEW)))
        return component_maps(first_component(sums), patches, self.survey.grid, ~self.sample.outliers)

    @analysis("massive activations")
    def massive(self) -> list[BlockActivations]:
        """The largest activations after every block."""
        model, sums = self.one_pass(), MassiveActivations(self.model.depth, self.model.embed_dim)
        at_once = min(16, self.options.batch_size)
        images, outliers = (part[:FEW].split(at_once) for part in (self.sample.images, self.sample.outliers))
        for batch, marked in zip(images, outliers, strict=True):
            with torch.no_grad(), use_precision(self.options.precision, model.device), capture(model) as seen:
                model.features(batch.to(model.device))
            sums.add([seen.after[layer].cpu() for layer in range(model.depth)], model.prefix, marked)
        return sums.result()

    @analysis("register neurons")
    def neurons(self) -> RegisterNeurons:
        """The hidden units that write the outliers."""
        if not self.diagnosis.judged.found:
            raise no_outliers("neurons that write them")
        return find_register_neurons(self.one_pass(), self.sample.images[:CALIBRATION])

    @analysis("register replacement")
    def replacement(self) -> ReplacementAudit:
        """What changes when registers are replaced."""
        if not self.model.num_registers:
            raise InputError("no registers that could be replaced")
        calls = list(self.sample.images[:FEW].split(self.options.batch_size))
        return audit_registers(self.one_pass(), lambda: calls, seed=self.options.seed)


ANALYSES = (
    "positions",
    "input_neighbours",
    "output_neighbours",
    "facets",
    "focus",
    "register_similarity",
    "overlap",
    "class_overlap",
    "position_probe",
    "linear",
    "mlp",
    "complexity",
    "components",
    "massive",
    "neurons",
    "replacement",
)
"""All evidence that the doctor shows."""
