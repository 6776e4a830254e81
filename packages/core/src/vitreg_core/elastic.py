"""A number of registers for every image: none, or all of them where the patches would hold outliers without."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitreg_core.cost import model_cost
from vitreg_core.errors import InputError
from vitreg_core.features import Features
from vitreg_core.outliers import find_outliers
from vitreg_core.vit import VisionTransformer


class AutoCost(NamedTuple):
    """What an automatic choice took, over all images so far."""

    images: int
    share: float
    """Part of the images that were run a second time, with registers; 0 to 1."""
    flops: float
    """Mean floating-point operations per image, as `model_cost` counts them."""
    relative: float
    """The same over those of one pass with all registers; above 1 the choice costs more than it saves."""


class AutoRegisters(VisionTransformer):
    """A model without registers, but for images with outliers, which are run again with all registers.

    Every image takes a pass without registers. Where its outlier score is above the cutoff, a second pass with all
    registers replaces it. The registers themselves are left out of what comes back, as their number differs. It shares
    all weights with the model and answers to what needs whole passes: a call, `features`, `classify`, `intermediate`,
    and timm's methods on these.
    """

    def __init__(self, model: VisionTransformer, cutoff: float) -> None:
        """Share the weights of a model.

        Args:
            model: trained with 0 to all of its registers (`elastic.sample`), or it is not itself without them.
            cutoff: outlier score above which an image is run again; from `calibrate`, or any number from 1.
        """
        nn.Module.__init__(self)  # no weights of its own
        vars(self).update(vars(model.with_registers(0)))
        self.registers = model.registers  # so that its state is that of the model
        self.passes = (model.with_registers(0), model)  # in a tuple, in which modules are not parts of this one
        self.source = f"{model.source}, registers chosen by image"
        self.cutoff = cutoff
        self.images = 0
        self.repeated = 0

    def intermediate(
        self, images: Float[Tensor, "b 3 height width"], layers: Sequence[int], *, norm: bool = True
    ) -> list[Features]:
        """Tokens after each named block, without registers; as `VisionTransformer.intermediate`."""
        without, whole = self.passes
        *first, last = without.intermediate(images, [*layers, -1], norm=False)
        again = outlier_scores(last.patches) > self.cutoff
        self.images, self.repeated = self.images + len(images), self.repeated + int(again.sum())
        if again.any():
            second = whole.intermediate(images[again], layers, norm=False)
            first = [replace(*pair, again) for pair in zip(first, second, strict=True)]
        return [self.name_tokens(self.norm(part.tokens), part.grid) for part in first] if norm else first

    def stream(
        self,
        images: Float[Tensor, "b 3 height width"],
        stop: int | None = None,
        masks: Bool[Tensor, "b p"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """The residual stream after the last block, without registers.

        Raises:
            InputError: asked for the inside of a pass, or for masks.
        """
        if stop is not None or masks is not None:
            self.refuse()
        return self.intermediate(images, [-1], norm=False)[0].tokens

    def packed(
        self,
        batches: Sequence[Float[Tensor, "_ 3 _ _"]],  # noqa: ARG002
        masks: Sequence[Bool[Tensor, "_ _"] | None] | None = None,  # noqa: ARG002
    ) -> list[Features]:
        """Not possible.

        Raises:
            InputError: always.
        """
        self.refuse()

    def refuse(self) -> NoReturn:
        """Refuse what takes one pass for all images."""
        raise InputError(
            "registers chosen by image: some images take one pass and others two; for packed batches, masks, queries, "
            "keys, values, attention and hidden units fix the number by model.with_registers(count)"
        )

    def cost(self, image_size: int | tuple[int, int] | None = None) -> AutoCost:
        """What the images so far took; those of one size, the native one by default.

        Raises:
            InputError: there were none.
        """
        if not self.images:
            raise InputError("no images were run yet, and cost is counted over them; call the model first")
        one, two = (model_cost(model.config, image_size).flops for model in self.passes)
        share = self.repeated / self.images
        return AutoCost(self.images, share, one + share * two, (one + share * two) / two)


def replace(one: Features, other: Features, rows: Bool[Tensor, " b"]) -> Features:
    """Features without registers, with those of another pass for some images."""
    cls = None if one.cls is None or other.cls is None else one.cls.index_put((rows,), other.cls)
    return Features(cls, one.registers, one.patches.index_put((rows,), other.patches), one.grid)


def outlier_scores(patches: Float[Tensor, "b p d"]) -> Float[Tensor, " b"]:
    """Largest over median norm of the patch tokens of each image, before the final norm; 1 or more."""
    logs = torch.linalg.vector_norm(patches.detach().float(), dim=-1).log()
    return (logs.amax(dim=1) - logs.quantile(0.5, dim=1)).exp()


@torch.no_grad()
def calibrate(model: VisionTransformer, batches: Iterable[Float[Tensor, "_ 3 _ _"]]) -> float:
    """Outlier score above which an image has outliers without registers, by the rule of `find_outliers`.

    The rule needs many tokens and the images must be like those to come: some dozens, normalised, none used to measure.

    Returns:
        The cutoff for `AutoRegisters`; infinity where there is no outlier mode, so that no image needs registers.

    Raises:
        InputError: no images, or tokens that are not finite.
    """
    without = model.with_registers(0)
    parts = [without.intermediate(images, [-1], norm=False)[0].patches.float().norm(dim=-1).cpu() for images in batches]
    norms = torch.cat(parts) if parts else torch.empty(0, 1)
    found = find_outliers(norms)
    if found.cutoff is None:
        return math.inf
    return found.cutoff / float(norms.double().log().quantile(0.5, dim=1).quantile(0.5).exp())
