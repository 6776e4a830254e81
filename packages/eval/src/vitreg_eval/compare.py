"""Which differences between two results exceed the noise: intervals of differences over the images.

Two models that were measured on the same images are compared in pairs, on the same resamples of the images (Efron and
Tibshirani 1993, ch. 13): what makes an image hard for both cancels, so that the interval is far smaller than those of
the two values suggest. Otherwise the two are taken as independent and normal, with the widths of their intervals.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from vitreg_core.errors import InputError

from vitreg_eval.metrics import Metric, middle
from vitreg_eval.results import Result, align, number

NOT_COMPARED = ("device", "batch_size", "cache")
"""Settings that change no number by more than rounding; but see `counts`."""
FEWEST = 20
"""Images below which resamples say too little of the noise for a verdict."""
Z95 = 1.959964
"""Standard deviations from the mean to the ends of the middle 95 % of a normal law."""


@dataclass(frozen=True)
class Difference:
    """One metric of two results."""

    metric: str
    first: float
    """Value of the first result."""
    other: float
    """Value of the other."""
    difference: float
    """Other minus first."""
    ci95: tuple[float, float] | None
    """95 % interval of the difference; none where a value has none."""
    method: Literal["paired", "unpaired", "none"]
    """On the same resamples of the same images; from two intervals; or not at all."""
    n: int
    """Images, of the one that was measured on fewer."""

    @property
    def verdict(self) -> str:
        """Whether 0 lies outside of the interval."""
        if self.ci95 is None:
            return "no interval"
        if self.n < FEWEST:
            return "too few images"
        low, high = self.ci95
        return "beyond noise" if low > 0 or high < 0 else "within noise"


@dataclass(frozen=True)
class Comparison:
    """Two results, metric by metric."""

    first: Result
    other: Result
    differences: list[Difference]
    notes: list[str]
    """What the two differ in besides the model, and what to know of the intervals."""

    def text(self) -> str:
        """Table and notes for a terminal."""
        header = ("metric", "A", "B", "B - A", "95 % interval", "")
        rows = [header, *(cells(row) for row in self.differences)]
        models = [f"A: {self.first.model.source}", f"B: {self.other.model.source}"]
        return "\n".join([f"{self.first.task} on {place(self.first)}", *models, align(rows), *self.notes])

    def record(self) -> dict[str, Any]:
        """The same for compare.json."""
        about = [
            {"task": one.task, "model": one.model.model_dump(), "data": one.data.model_dump(), "seed": one.seed}
            for one in (self.first, self.other)
        ]
        rows = [asdict(row) | {"verdict": row.verdict} for row in self.differences]
        return {"first": about[0], "other": about[1], "differences": rows, "notes": self.notes}


def compare(first: Result, other: Result) -> Comparison:
    """Compare the metrics that two results share.

    Raises:
        InputError: results of different tasks, or without a metric in common.
    """
    if first.task != other.task:
        raise InputError(
            f"{first.task} of {first.model.source} with {other.task} of {other.model.source}: their numbers mean "
            "different things; give results of one task"
        )
    if not first.metrics and not other.metrics:
        raise InputError(f"{first.task} gives no numbers to compare; give results of a task that measures")
    shared = [name for name in first.metrics if name in other.metrics]
    if not shared:
        raise InputError(
            f"{first.task}: no metric in common ({', '.join(first.metrics)} and {', '.join(other.metrics)}); "
            "measure both with the same options"
        )
    same = first.data.hash == other.data.hash and first.seed == other.seed
    rows = [difference(name, first.metrics[name], other.metrics[name], same_images=same) for name in shared]
    return Comparison(first, other, rows, [*unlike(first, other), *about_intervals(rows)])


def difference(name: str, first: Metric, other: Metric, *, same_images: bool) -> Difference:
    """Difference of a metric, with an interval if both have one.

    An interval without width, of images that are all alike, tells nothing of the noise in other images: there is none
    for two of them that are not paired.
    """
    apart, n = other.value - first.value, min(first.n, other.n)
    if same_images and first.n == other.n and len(first.resamples) == len(other.resamples) > 0:
        drawn = torch.tensor(other.resamples, dtype=torch.float64) - torch.tensor(first.resamples, dtype=torch.float64)
        return Difference(name, first.value, other.value, apart, middle(drawn), "paired", n)
    if any(one.ci95 is None or one.ci95[0] == one.ci95[1] for one in (first, other)):
        return Difference(name, first.value, other.value, apart, None, "none", n)
    half = math.hypot(*((one.ci95[1] - one.ci95[0]) / 2 for one in (first, other) if one.ci95))
    return Difference(name, first.value, other.value, apart, (apart - half, apart + half), "unpaired", n)


def unlike(first: Result, other: Result) -> Iterator[str]:
    """What two results differ in besides the model, a sentence each."""
    if first.data.hash != other.data.hash:
        yield f"different data: A on {place(first)}, B on {place(other)}"
    if first.model.hash == other.model.hash:
        yield "the same model: both have the same weights"
    if first.seed != other.seed:
        yield f"different seeds: {first.seed} and {other.seed}"
    changed = [
        f"{name} {first.settings.get(name, 'not there')} and {other.settings.get(name, 'not there')}"
        for name in dict.fromkeys([*first.settings, *other.settings])
        if counts(first.task, name) and first.settings.get(name) != other.settings.get(name)
    ]
    if changed:
        yield f"different settings: {'; '.join(changed)}"
    alone = [
        f"{name} only in {which}"
        for which, one, two in (("A", first, other), ("B", other, first))
        for name in one.metrics
        if name not in two.metrics
    ]
    if alone:
        yield ", ".join(alone)
    changed_versions = [
        f"{name} {first.versions[name]} and {other.versions[name]}"
        for name in first.versions
        if name in other.versions and first.versions[name] != other.versions[name]
    ]
    if changed_versions:
        yield f"different versions: {', '.join(changed_versions)}"


def counts(task: str, setting: str) -> bool:
    """Whether a setting changes numbers by more than rounding; heads of `segment` are trained on its batches."""
    return setting not in NOT_COMPARED or (task, setting) == ("segment", "batch_size")


def about_intervals(rows: Sequence[Difference]) -> Iterator[str]:
    """What to know of the intervals of a table."""
    for method, how in (
        ("paired", "paired on the same resamples of the same images"),
        ("unpaired", "from the two intervals, as if independent and normal"),
    ):
        names = [row.metric for row in rows if row.method == method]
        if names:
            yield f"interval of {', '.join(names)}: {how}"
    if any(row.ci95 for row in rows):
        yield (
            "each interval holds 95 % by itself, without a correction for their number: of equal models about one "
            "metric in twenty stands out; the noise is that of the images, not of training"
        )


def place(one: Result) -> str:
    """Data of a result in words."""
    return f"{one.data.name} {one.data.split} ({one.data.n} images, {one.data.hash[:8]})"


def cells(row: Difference) -> tuple[str, ...]:
    """A row of the table."""
    ends = "-" if row.ci95 is None else f"{row.ci95[0]:+.4g} to {row.ci95[1]:+.4g}"
    return row.metric, number(row.first), number(row.other), f"{row.difference:+.4g}", ends, row.verdict
