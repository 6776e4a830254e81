"""What registers hold: how much class token, patches and accuracy change when registers are replaced.

Registers become zeros, their mean over a calibration set, those of another image, or noise, after every block
(arXiv 2604.14433; Sun et al. 2024, Fix-Reg-Mean). If only zeros hurt, their exact content matters little.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone, Features
from vitreg_core.replace_registers import KINDS, Kind, register_statistics, replace_registers
from vitreg_core.vit import VisionTransformer

from vitreg_eval.analyses.panels import panels
from vitreg_eval.metrics import Metric, measure, top_k

Images = Callable[[], Iterable[Float[Tensor, "_ 3 _ _"]]]
"""Gives normalised pixels in batches, the same ones in the same order at every call."""
Read = Callable[[Features], Float[Tensor, "b classes"]]
"""Logits from the tokens after the final norm."""


@dataclass(frozen=True)
class Replaced:
    """What one kind of replacement changes."""

    kind: Kind
    cls: Metric | None
    """Cosine of the class token with that of the untouched model, after the final norm, -1 to 1; None without one."""
    patches: Metric
    """The same of the patches, mean over those of an image."""
    top1: Metric | None
    """Accuracy of the head, 0 to 1; None where there are no labels or no head."""


@dataclass(frozen=True)
class ReplacementAudit:
    """The untouched model and every kind of replacement, on the same images."""

    untouched_top1: Metric | None
    kinds: tuple[Replaced, ...]
    layers: tuple[int, ...] | None
    """Blocks after which registers were replaced; None for all."""

    @property
    def images(self) -> int:
        """How many images were measured."""
        return self.kinds[0].patches.n


class Seen(NamedTuple):
    """What a pass over a batch gives, on the CPU."""

    cls: Float[Tensor, " b"] | None
    """Cosine with the class token of the untouched model."""
    patches: Float[Tensor, " b"]
    """Mean cosine with the patches of the untouched model."""
    logits: Float[Tensor, "b classes"] | None


@torch.no_grad()
def audit_registers(
    backbone: Backbone,
    images: Images,
    *,
    calibration: Images | None = None,
    labels: Int[Tensor, " n"] | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> ReplacementAudit:
    """Replace the registers in every way and compare with the untouched model.

    Args:
        backbone: with registers, in evaluation mode.
        images: what to measure on, two or more in all; a last batch of a single image joins the one before.
        calibration: what mean and noise are taken from; the same images if not given.
        labels: class of every image, in order, as the model's own head counts them; without labels, or a head that is
            known, there is no accuracy.
        layers: blocks after which registers are replaced, from 0; all if not given.
        seed: of shuffled, noise and the intervals.

    Raises:
        InputError: a model without registers, fewer than two images, or labels of another number of images.
    """
    statistics = register_statistics(backbone, (calibration or images)())
    read = None if labels is None else head_of(backbone)
    plain: list[Seen] = []
    seen: dict[Kind, list[Seen]] = {kind: [] for kind in KINDS}
    for number, batch in enumerate(without_lone_images(images())):
        pixels = batch.to(backbone.device)
        untouched = backbone.features(pixels)
        plain.append(seen_in(untouched, untouched, read))
        drawn = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        for kind, passes in seen.items():
            with replace_registers(backbone, kind, statistics=statistics, layers=layers, seed=drawn):
                touched = backbone.features(pixels)
            passes.append(seen_in(touched, untouched, read))
    return ReplacementAudit(
        untouched_top1=accuracy(plain, labels, seed),
        kinds=tuple(summary(kind, passes, labels, seed) for kind, passes in seen.items()),
        layers=None if layers is None else tuple(layers),
    )


def head_of(backbone: Backbone) -> Read | None:
    """What names classes from the tokens after the final norm; None for a model of another library, or without head."""
    if not isinstance(backbone, VisionTransformer) or backbone.head is None:
        return None
    head, fc_norm = backbone.head, backbone.fc_norm
    return lambda features: head(fc_norm(backbone.pooled(features.tokens)))


def seen_in(touched: Features, untouched: Features, read: Read | None) -> Seen:
    """One pass, compared with the untouched one."""
    cls, patches = closeness(touched, untouched)
    return Seen(cls, patches, None if read is None else read(touched).float().cpu())


def closeness(touched: Features, untouched: Features) -> tuple[Float[Tensor, " b"] | None, Float[Tensor, " b"]]:
    """Cosine of the class token (None without one), and mean cosine of the patches, of each image in two passes."""
    patches = F.cosine_similarity(touched.patches.float(), untouched.patches.float(), dim=-1).mean(dim=1).cpu()
    if touched.cls is None or untouched.cls is None:
        return None, patches
    return F.cosine_similarity(touched.cls.float(), untouched.cls.float(), dim=-1).cpu(), patches


def without_lone_images(
    batches: Iterable[Float[Tensor, "_ 3 _ _"]],
) -> Iterator[Float[Tensor, "_ 3 _ _"]]:
    """The same images, a batch of one joined to the batch before, so that every image can get another's registers.

    Raises:
        InputError: fewer than two images in all, or a lone one of another size.
    """
    held: Tensor | None = None
    for batch in batches:
        if held is not None and min(len(held), len(batch)) > 1:
            yield held
            held = None
        if held is not None and held.shape[1:] != batch.shape[1:]:
            sizes = " and ".join("x".join(map(str, one.shape[-2:])) for one in (held, batch))
            raise InputError(f"images of {sizes} pixels, one of them alone in its batch; give images of one size")
        held = batch if held is None else torch.cat([held, batch])
    if held is None or len(held) < 2:
        raise InputError(
            f"{0 if held is None else 1} images; registers are replaced by those of others: give 2 or more"
        )
    yield held


def summary(kind: Kind, passes: Sequence[Seen], labels: Int[Tensor, " n"] | None, seed: int) -> Replaced:
    """Means over all images."""
    cls = [one.cls for one in passes if one.cls is not None]
    return Replaced(
        kind=kind,
        cls=measure(torch.cat(cls), seed=seed) if cls else None,
        patches=measure(torch.cat([one.patches for one in passes]), seed=seed),
        top1=accuracy(passes, labels, seed),
    )


def accuracy(passes: Sequence[Seen], labels: Int[Tensor, " n"] | None, seed: int) -> Metric | None:
    """Part of the images whose class the head names; None without labels or head."""
    logits = [one.logits for one in passes if one.logits is not None]
    if labels is None or not logits:
        return None
    scores = torch.cat(logits)
    if len(scores) != len(labels):
        raise InputError(f"{len(labels)} labels for {len(scores)} images; give one label for each image")
    return measure(top_k(scores, labels), seed=seed)


def plot_replacement(found: ReplacementAudit) -> Figure:
    """Cosine with the untouched model for every kind, and the accuracy of the head beside it where there is one."""
    known = found.untouched_top1 is not None
    figure, grid = panels(1, 1 + known, width=3.6, height=2.9)
    draw_bars(grid[0, 0], found.kinds, {"class token": "cls", "patches": "patches"})
    grid[0, 0].set_ylabel("cosine with the untouched model")
    where = "every block" if found.layers is None else f"block {', '.join(map(str, found.layers))}"
    grid[0, 0].set_title(f"registers replaced after {where}", fontsize=8)
    if found.untouched_top1 is not None:
        draw_bars(grid[0, 1], found.kinds, {"replaced": "top1"})
        grid[0, 1].axhline(found.untouched_top1.value, color="black", linestyle=":", label="untouched")
        grid[0, 1].set_ylabel("top-1 accuracy")
        grid[0, 1].set_title(f"{found.images} images", fontsize=8)
    for axes in grid[0]:
        axes.legend(fontsize=7, loc="lower right")
    return figure


def draw_bars(axes: Axes, kinds: Sequence[Replaced], measures: Mapping[str, str]) -> None:
    """A group of bars for every kind of replacement, with 95 % intervals; what a model lacks is left out."""
    for place, (label, field) in enumerate(measures.items()):
        known = [(index, getattr(one, field)) for index, one in enumerate(kinds) if getattr(one, field) is not None]
        if not known:
            continue
        values = np.array([metric.value for _, metric in known])
        ends = np.array([metric.ci95 or (metric.value, metric.value) for _, metric in known])
        beyond = np.stack([values - ends[:, 0], ends[:, 1] - values]).clip(min=0)
        places = np.array([index for index, _ in known]) + 0.4 * place - 0.2 * (len(measures) - 1)
        axes.bar(places, values, 0.38, yerr=beyond, capsize=3, label=label)
    axes.set_xticks(range(len(kinds)), [one.kind for one in kinds])
