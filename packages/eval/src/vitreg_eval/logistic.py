"""Logistic regression on frozen features, along a path of penalties.

The objective is that of scikit-learn: `strength * sum of losses + 1/2 sum of squared weights`, the intercept without
penalty; a greater strength (C) means a weaker penalty. L-BFGS works in coordinates in which the curvature at the start
is about 1, by the Cholesky factor of a Hessian that all classes share. Features of transformers have a few directions
of very high variance, for which it would otherwise need many more passes over the data.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.errors import InputError

STRENGTHS = tuple(10 ** (-6 + 11 * index / 44) for index in range(45))
"""The 45 values of C that DINOv2 tries, evenly spaced in their logarithm."""
ENTRIES_AT_ONCE = 2**22
"""Scores held in memory during a pass over the data."""
HISTORY = 10
"""Steps that L-BFGS remembers."""
MOST_TRIALS = 10
"""Lengths of a step that are tried."""
ROUGH = 1e-7
"""Tolerance in float32, before float64 takes over."""
ROUND = 100
"""Passes after which the coordinates are chosen anew."""
LEAST_CURVATURE = 1e-10
"""Least product of a step and its change of gradient, over the square of the change, that is remembered."""
LEAST_SPREAD = 1e-8
"""Least mean variance p (1 - p) of a prediction that the scaling assumes."""


@dataclass(frozen=True)
class Fitted:
    """A classifier at the optimum of one strength."""

    weight: Float[Tensor, "classes d"]
    bias: Float[Tensor, " classes"]
    strength: float
    """C."""
    objective: float
    """What was minimised."""
    passes: int
    """Evaluations of the objective, each a pass over the data."""

    def scores(self, features: Float[Tensor, "m d"]) -> Float[Tensor, "m classes"]:
        """Logits, in the number type of the features."""
        return F.linear(features, self.weight.to(features), self.bias.to(features))


class Problem:
    """Features and labels, and the loss over all of them with its gradient, in chunks.

    Args:
        features: any number type; may be memory-mapped.
        labels: a class for each sample, or a row of 1 (there), 0 (not there), -1 (not judged) over the classes, which
            are then told apart one by one.
        classes: how many.
        dtype: of the arithmetic; float32 is inexact for the greatest C, where losses are small.
        device: where to compute.
    """

    def __init__(
        self,
        features: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"] | Int[Tensor, "n classes"],
        classes: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
    ) -> None:
        self.features, self.labels, self.classes, self.dtype = features, labels, classes, dtype
        self.device = device or features.device
        self.width = features.shape[1] + 1
        self.rows = max(1, ENTRIES_AT_ONCE // max(classes, self.width))

    def zeros(self, *shape: int) -> Tensor:
        """Zeros where the work is done."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def chunks(self, every: int = 1) -> Iterator[tuple[Float[Tensor, "part d"], Tensor]]:
        """Features and labels in parts that fit into memory; of every so many samples one."""
        for start in range(0, len(self.features), self.rows * every):
            part = slice(start, start + self.rows * every, every)
            yield self.features[part].to(self.device, self.dtype), self.labels[part].to(self.device)

    def scores(self, features: Float[Tensor, "part d"], unknown: Float[Tensor, "width classes"]) -> Tensor:
        """Logits; the last row of the unknown is the bias."""
        return torch.addmm(unknown[-1], features, unknown[:-1])

    def losses(self, unknown: Float[Tensor, "width classes"]) -> tuple[float, Float[Tensor, "width classes"]]:
        """Sum of the losses and its gradient."""
        residuals = residuals_of_classes if self.labels.ndim == 1 else residuals_of_rows
        loss, gradient = 0.0, torch.zeros_like(unknown)
        for part, labels in self.chunks():
            losses, found = residuals(self.scores(part, unknown), labels)
            loss += losses
            gradient[:-1].addmm_(part.T, found)
            gradient[-1] += found.sum(dim=0)
        return loss, gradient

    def curvature(self, unknown: Float[Tensor, "width classes"]) -> Float[Tensor, "width width"]:
        """Hessian of the sum of the losses, its mean over the classes; from some of the samples where d is great."""
        every = max(1, min(self.width // (8 * self.classes), len(self.features) // (8 * self.width)))
        total = self.zeros(self.width, self.width)
        for part, _ in self.chunks(every):
            scores = self.scores(part, unknown)
            chances = scores.softmax(dim=1) if self.labels.ndim == 1 else scores.sigmoid()
            spread = (chances * (1 - chances)).mean(dim=1, keepdim=True).clamp_min(LEAST_SPREAD)
            wide = torch.cat([part, torch.ones_like(part[:, :1])], dim=1)
            total.addmm_((spread * wide).T, wide)
        return every * total


def residuals_of_classes(
    scores: Float[Tensor, "b classes"], labels: Int[Tensor, " b"]
) -> tuple[float, Float[Tensor, "b classes"]]:
    """Sum of the cross-entropies, and its gradient by the scores."""
    logs = scores.log_softmax(dim=1)
    loss = -logs.gather(1, labels[:, None]).sum(dtype=torch.float64).item()
    return loss, logs.exp_().scatter_add_(1, labels[:, None], logs.new_full((len(labels), 1), -1.0))


def residuals_of_rows(
    scores: Float[Tensor, "b classes"], labels: Int[Tensor, "b classes"]
) -> tuple[float, Float[Tensor, "b classes"]]:
    """Sum of the binary cross-entropies of what is judged, and its gradient by the scores."""
    judged, truth = (labels >= 0).to(scores), (labels == 1).to(scores)
    losses = F.binary_cross_entropy_with_logits(scores, truth, reduction="none") * judged
    return losses.sum(dtype=torch.float64).item(), (scores.sigmoid() - truth) * judged


def fit_path(
    problem: Problem,
    strengths: Sequence[float] = STRENGTHS,
    *,
    passes: int = 1000,
    tolerance: float = 1e-8,
) -> Iterator[Fitted]:
    """Fit for one strength after the other, each from the optimum of the one before.

    Args:
        problem: what to fit.
        strengths: values of C, best in ascending order.
        passes: most passes over the data for each.
        tolerance: stop when the next step is expected to gain no more than this part of the objective.
    """
    stages = [(problem, tolerance)]
    if problem.dtype == torch.float64:  # most of the way in float32, at less than half the time
        rough = Problem(problem.features, problem.labels, problem.classes, dtype=torch.float32, device=problem.device)
        stages.insert(0, (rough, max(tolerance, ROUGH)))
    unknown = problem.zeros(problem.width, problem.classes)
    for strength in strengths:
        used, objective = 0, 0.0
        for stage, enough in stages:
            unknown, objective, took = descend(stage, strength, unknown.to(stage.dtype), passes - used, enough)
            used += took
        weight, bias = unknown[:-1].T.contiguous().cpu(), unknown[-1].cpu()
        yield Fitted(weight, bias, strength, objective, used)


def descend(
    problem: Problem, strength: float, start: Float[Tensor, "width classes"], passes: int, tolerance: float
) -> tuple[Float[Tensor, "width classes"], float, int]:
    """As `fit`, with coordinates that are chosen anew from time to time; at least one pass."""
    unknown, objective, used = fit(problem, strength, start, min(ROUND, passes), tolerance)
    while used < passes and used % ROUND == 0:
        unknown, objective, took = fit(problem, strength, unknown, min(ROUND, passes - used), tolerance)
        used += took
    return unknown, objective, used


def fit(
    problem: Problem, strength: float, start: Float[Tensor, "width classes"], passes: int, tolerance: float
) -> tuple[Float[Tensor, "width classes"], float, int]:
    """The optimum of one strength, its objective, and the passes that it took."""
    penalty = torch.ones_like(start[:, :1])
    penalty[-1] = 0
    factor = cholesky(strength * problem.curvature(start).double() + penalty[:, 0].double().diag()).to(start)

    def objective(scaled: Float[Tensor, "width classes"]) -> tuple[float, Float[Tensor, "width classes"]]:
        unknown = torch.linalg.solve_triangular(factor.T, scaled, upper=True)
        losses, gradient = problem.losses(unknown)
        gradient = strength * gradient + penalty * unknown
        value = strength * losses + (penalty * unknown).square().sum(dtype=torch.float64).item() / 2
        return value, torch.linalg.solve_triangular(factor, gradient, upper=False)

    scaled, value, used = minimise(objective, factor.T @ start, passes, tolerance)
    return torch.linalg.solve_triangular(factor.T, scaled, upper=True), value, used


def cholesky(hessian: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    """Cholesky factor, with as little added to the diagonal as makes it positive in spite of rounding."""
    for exponent in range(-14, 1):
        shift = 10.0**exponent * hessian.diagonal().mean()
        factor, failed = torch.linalg.cholesky_ex(hessian + shift * torch.eye(len(hessian)).to(hessian))
        if not failed and factor.isfinite().all():
            return factor
    raise InputError("features that are not finite cannot be classified; run the model in fp32, or check its weights")


Objective = Callable[[Tensor], tuple[float, Tensor]]


def minimise(
    objective: Objective, unknown: Float[Tensor, "*shape"], evaluations: int, tolerance: float
) -> tuple[Float[Tensor, "*shape"], float, int]:
    """L-BFGS (Nocedal and Wright 2006, algorithm 7.5) on a convex function; where, its value, and evaluations used."""
    value, gradient = objective(unknown)
    used = 1
    steps: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=HISTORY)
    while used < evaluations:
        direction = -inverse_hessian(gradient, steps)
        slope = dot(gradient, direction)
        if -slope / 2 <= tolerance * value:
            break
        most = min(MOST_TRIALS, evaluations - used)
        step, new_value, new_gradient, tried = line_search(objective, unknown, direction, value, slope, most)
        used += tried
        if new_value >= value:  # all that is left is rounding
            break
        change = new_gradient - gradient
        product = dot(step, change)
        if product > LEAST_CURVATURE * dot(change, change):  # or rounding has eaten it
            steps.append((step, change, product))
        unknown, value, gradient = unknown + step, new_value, new_gradient
    return unknown, value, used


def line_search(
    objective: Objective,
    start: Float[Tensor, "*shape"],
    direction: Float[Tensor, "*shape"],
    value: float,
    slope: float,
    most: int,
) -> tuple[Float[Tensor, "*shape"], float, Float[Tensor, "*shape"], int]:
    """Shorten a step, by the parabola through what is known, until it gains; step, value, gradient, evaluations.

    On a convex function any step that gains has a positive curvature, so that none need be lengthened.
    """
    length, tried = 1.0, 0
    while True:
        found, gradient = objective(start + length * direction)
        tried += 1
        if found <= value + 1e-4 * length * slope or tried == most:
            return length * direction, found, gradient, tried
        length *= min(max(-slope * length / (2 * (found - value - slope * length)), 0.1), 0.5)


def inverse_hessian(
    gradient: Float[Tensor, "*shape"], steps: Sequence[tuple[Tensor, Tensor, float]]
) -> Float[Tensor, "*shape"]:
    """The gradient times the inverse Hessian that the steps tell of: two loops, algorithm 7.4."""
    found, shares = gradient.clone(), []
    for moved, change, product in reversed(steps):
        shares.append(dot(moved, found) / product)
        found.sub_(change, alpha=shares[-1])
    if steps:
        _, change, product = steps[-1]
        found *= product / dot(change, change)
    for (moved, change, product), share in zip(steps, reversed(shares), strict=True):
        found.add_(moved, alpha=share - dot(change, found) / product)
    return found


def dot(left: Float[Tensor, "*shape"], right: Float[Tensor, "*shape"]) -> float:
    """Sum of the products."""
    return torch.dot(left.flatten(), right.flatten()).item()
