"""Image-text retrieval: whether an image's captions, or a caption's image, are among the nearest."""

from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.errors import InputError

from vitreg_eval.config.zeroshot import RetrievalOptions
from vitreg_eval.datasets.captions import Captioned, open_captions
from vitreg_eval.dual import Dual
from vitreg_eval.extract import extract
from vitreg_eval.metrics import Metric, measure
from vitreg_eval.results import Outcome
from vitreg_eval.texts import text_features

KS = (1, 5, 10)
ROWS = 512
"""Queries that are compared at once."""


def run(dual: Dual, options: RetrievalOptions, out: Path) -> Outcome:  # noqa: ARG001 (draws nothing)
    """Recall at 1, 5 and 10, 0 to 1: of images whose captions are ranked, and of captions whose images are ranked.

    Raises:
        InputError: captions or images that are missing or cannot be read.
    """
    assert options.data is not None
    captioned = open_captions(options.data, options.images)
    if len(captioned.paths) < 2:
        raise InputError(f"{options.data}: captions of {len(captioned.paths)} image; give two images or more")
    texts = text_features(dual, captioned.texts, options.cache)
    found = extract(dual, captioned.images(dual.preprocess, options.batch_size), options)
    images = F.normalize(found.cls, dim=-1)
    metrics = evaluate(images, texts, captioned.owners, options.seed)
    return Outcome(metrics, found.data, [*captioned.notes, *describe(dual, captioned)])


def evaluate(
    images: Float[Tensor, "n e"], texts: Float[Tensor, "m e"], owners: Int[Tensor, " m"], seed: int
) -> dict[str, Metric]:
    """Recall in both directions, with the value that ranking at random has.

    Args:
        images: of length 1.
        texts: of length 1.
        owners: index of the image of each text.
        seed: of the intervals, which are over images with all of their texts.
    """
    of_images, of_texts = image_ranks(images, texts, owners), text_ranks(images, texts, owners)
    own = torch.bincount(owners, minlength=len(images))
    metrics = {}
    for k in KS:
        if k < len(texts):
            found = measure(of_images < k, seed=seed)
            metrics[f"image_to_text_r{k}"] = noted(found, text_chance(own, k), f"{len(texts)} captions")
    for k in KS:
        if k < len(images):
            hits = torch.zeros(len(images), dtype=torch.int64).index_add(0, owners, (of_texts < k).long())
            found = measure(torch.stack([hits, own], dim=1), pooled_recall, seed=seed)
            metrics[f"text_to_image_r{k}"] = noted(found, k / len(images), f"{len(images)} images")
    return metrics


def noted(metric: Metric, chance: float, ranked: str) -> Metric:
    """A metric with the value of chance."""
    return metric.model_copy(update={"note": f"chance {chance:.3g} among {ranked}"})


def text_ranks(
    images: Float[Tensor, "n e"], texts: Float[Tensor, "m e"], owners: Int[Tensor, " m"]
) -> Int[Tensor, " m"]:
    """How many images stand before the one that each text belongs to; of equally near ones the first stands first."""
    order = torch.arange(len(images))
    ranks = []
    for part, own in zip(texts.split(ROWS), owners.split(ROWS), strict=True):
        near = part @ images.T
        mine = near.gather(1, own[:, None])
        ranks.append(((near > mine) | ((near == mine) & (order < own[:, None]))).sum(dim=1))
    return torch.cat(ranks)


def image_ranks(
    images: Float[Tensor, "n e"], texts: Float[Tensor, "m e"], owners: Int[Tensor, " m"]
) -> Int[Tensor, " n"]:
    """How many texts stand before the best of those that belong to each image; ties as for `text_ranks`."""
    order = torch.arange(len(texts))
    ranks = []
    for part, number in zip(images.split(ROWS), torch.arange(len(images)).split(ROWS), strict=True):
        near = part @ texts.T
        own = owners == number[:, None]
        best = near.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        first = torch.where(own & (near == best), order, len(texts)).amin(dim=1, keepdim=True)
        ranks.append(((near > best) | ((near == best) & (order < first))).sum(dim=1))
    return torch.cat(ranks)


def pooled_recall(values: Int[Tensor, "n 2"], counts: Float[Tensor, "repeats n"]) -> Float[Tensor, " repeats"]:
    """Share of the texts that are found, of hits and texts of each image."""
    hits, texts = (counts @ values.double()).unbind(dim=1)
    return hits / texts


def text_chance(own: Int[Tensor, " n"], k: int) -> float:
    """Recall at k of ranking texts at random: 1 - C(m - own, k) / C(m, k), averaged over images."""
    total = int(own.sum())
    steps = torch.arange(k, dtype=torch.float64)
    misses = (rearrange(total - own, "n -> n 1") - steps).clamp_min(0) / (total - steps)
    return (1 - misses.prod(dim=1)).mean().item()


def describe(dual: Dual, captioned: Captioned) -> list[str]:
    """What the reader must know: how many captions, which share their words, which were cut."""
    images, texts = len(captioned.paths), captioned.texts
    notes = [f"{len(texts):,} captions of {images:,} images; intervals over images with all of their captions"]
    owners: dict[str, set[int]] = {}
    for text, owner in zip(texts, captioned.owners.tolist(), strict=True):
        owners.setdefault(text.casefold(), set()).add(owner)
    if shared := sum(len(of) > 1 for of in owners.values()):
        notes.append(f"{shared} captions are those of several images; of equally near ones the first counts as nearer")
    if cut := dual.too_long(texts):
        notes.append(f"{cut} captions are longer than the text tower reads; their ends were cut off")
    return notes
