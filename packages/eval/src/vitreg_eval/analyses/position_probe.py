"""Can a patch's place be read off its token? A linear probe (registers paper, figure 5b, position).

The paper says that outliers have lost it: 22.8 % right against 41.7 %, 5.09 patches off against 0.79 (DINOv2 ViT-g).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_eval.analyses.kinds import ByKind, draw_kinds, mean_by_kind
from vitreg_eval.analyses.panels import panels
from vitreg_eval.analyses.splits import split_images

EPOCHS, PATIENCE = 30, 3
BATCH = 1024
LEARNING_RATE = 1e-3
SHRINKAGE = 0.1
"""Added to the within-position variance of standardised tokens before it is inverted."""


@dataclass(frozen=True)
class FixedAnswer:
    """What the best single position, named for every token of a kind, would give.

    Outliers prefer some positions, at times the same few in all images. A probe that knows an outlier from a normal
    patch is then right more often than by chance without knowing where it is: read its numbers beside these.
    """

    top1: float
    """Share of the tokens at their commonest position, 0 to 1."""
    distance: float
    """Least mean distance of the tokens to any one position, in patches."""


@dataclass(frozen=True)
class PositionProbe:
    """How well one linear probe names the position of a patch, on images that it was not fitted on."""

    top1: ByKind
    """Share of the tokens whose position is named exactly, 0 to 1."""
    distance: ByKind
    """Mean Euclidean distance between the named and the true position, in patches."""
    normal_fixed: FixedAnswer | None
    """Without looking at the tokens of normal patches; None without any."""
    outlier_fixed: FixedAnswer | None
    """The same of outliers."""
    chance_top1: float
    """What a guess would give: one over the number of positions."""
    chance_distance: float
    """Mean distance between two positions drawn at random, in patches."""
    train_images: int
    """Fitted on, those to stop early by included."""
    test_images: int
    epochs: int
    """Passes over the training tokens until the best probe; 0 if none improved on the closed-form start."""


class Probe(nn.Module):
    """Standardise, then one linear layer; it starts as a linear discriminant."""

    mean: Tensor
    std: Tensor

    def __init__(self, tokens: Float[Tensor, "b p d"]) -> None:
        super().__init__()
        self.register_buffer("mean", tokens.mean(dim=(0, 1)))
        self.register_buffer("std", tokens.std(dim=(0, 1), correction=0).clamp_min(1e-6))
        weight, bias = discriminant(self.standardise(tokens))
        self.linear = nn.utils.skip_init(nn.Linear, tokens.shape[2], tokens.shape[1])
        self.linear.weight.data.copy_(weight)
        self.linear.bias.data.copy_(bias)

    def standardise(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Tokens of mean 0 and variance 1 per dimension on the training images."""
        return (tokens - self.mean) / self.std

    def forward(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n p"]:
        """Scores of all positions."""
        return self.linear(self.standardise(tokens))


def probe_positions(
    tokens: Float[Tensor, "b p d"], outliers: Bool[Tensor, "b p"], grid: tuple[int, int], *, seed: int = 0
) -> PositionProbe:
    """Fit a softmax over the positions on all tokens of 80 % of the images; judge it by those of the others.

    Args:
        tokens: of one block, after the final norm for the last.
        outliers: which patches are outliers. The probe does not know.
        grid: rows and columns of patches.
        seed: of the split, the order of the tokens and the intervals over images.

    Raises:
        InputError: fewer than ten images.
    """
    split = split_images(len(tokens), seed)
    probe, epochs = fit(tokens[split.train].float(), tokens[split.val].float(), seed)
    with torch.no_grad():
        named = torch.stack([probe(image.float()).argmax(dim=-1) for image in tokens[split.test]])
    places = positions(grid).to(named.device)
    distance = (places[named] - places).norm(dim=-1)
    judged = outliers[split.test].to(named.device)
    return PositionProbe(
        top1=mean_by_kind(distance == 0, judged, seed=seed),
        distance=mean_by_kind(distance, judged, seed=seed),
        normal_fixed=fixed_answer(~judged, places),
        outlier_fixed=fixed_answer(judged, places),
        chance_top1=1 / len(places),
        chance_distance=float(torch.cdist(places, places).mean()),
        train_images=len(tokens) - len(named),
        test_images=len(named),
        epochs=epochs,
    )


def positions(grid: tuple[int, int]) -> Float[Tensor, "p 2"]:
    """Row and column of every patch."""
    return torch.cartesian_prod(torch.arange(grid[0]).double(), torch.arange(grid[1]).double())


def fixed_answer(chosen: Bool[Tensor, "b p"], places: Float[Tensor, "p 2"]) -> FixedAnswer | None:
    """Best single answer for the chosen tokens; None where none is chosen."""
    if not chosen.any():
        return None
    shares = chosen.double().mean(dim=0) / chosen.double().mean(dim=0).sum()
    return FixedAnswer(float(shares.max()), float((torch.cdist(places, places) @ shares).min()))


def discriminant(tokens: Float[Tensor, "b p d"]) -> tuple[Float[Tensor, "p d"], Float[Tensor, " p"]]:
    """Weight and bias of the linear discriminant of the positions: where the fit starts, near its end."""
    means = tokens.mean(dim=0).double()
    within = torch.zeros(2 * means.shape[1:], dtype=torch.float64, device=tokens.device)
    for image in tokens.split(64):
        flat = rearrange(image - means, "b p d -> (b p) d").to(tokens)
        within += (flat.T @ flat).double()
    within /= tokens.shape[0] * tokens.shape[1]
    within.diagonal().add_(SHRINKAGE)
    weight = torch.linalg.solve(within, means.T).T
    return weight.to(tokens), (-0.5 * (weight * means).sum(dim=1)).to(tokens)


def fit(train: Float[Tensor, "b p d"], val: Float[Tensor, "v p d"], seed: int) -> tuple[Probe, int]:
    """Adam on the cross-entropy until it stops falling on held-out images; the best probe and its epoch."""
    probe = Probe(train)
    flat = rearrange(train, "b p d -> (b p) d")
    labels = repeat(torch.arange(train.shape[1], device=train.device), "p -> (b p)", b=len(train))
    optimizer = torch.optim.Adam(probe.linear.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    generator = torch.Generator().manual_seed(seed)
    best, lowest, at = probe.linear.state_dict(), held_out_loss(probe, val), 0
    best = {name: value.clone() for name, value in best.items()}
    for epoch in range(1, EPOCHS + 1):
        train_epoch(probe, optimizer, flat, labels, generator)
        schedule.step()
        loss = held_out_loss(probe, val)
        if loss < lowest:
            best = {name: value.clone() for name, value in probe.linear.state_dict().items()}
            lowest, at = loss, epoch
        elif epoch - at >= PATIENCE:
            break
    probe.linear.load_state_dict(best)
    return probe, at


def train_epoch(
    probe: Probe,
    optimizer: torch.optim.Optimizer,
    tokens: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    generator: torch.Generator,
) -> None:
    """One pass over all tokens in random order."""
    for chosen in torch.randperm(len(tokens), generator=generator).to(tokens.device).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(probe(tokens[chosen]), labels[chosen]).backward()
        optimizer.step()


@torch.no_grad()
def held_out_loss(probe: Probe, tokens: Float[Tensor, "v p d"]) -> float:
    """Mean cross-entropy on images that are not fitted on."""
    labels = torch.arange(tokens.shape[1], device=tokens.device)
    return sum(float(F.cross_entropy(probe(image), labels)) for image in tokens) / len(tokens)


def plot_position_probe(found: PositionProbe) -> Figure:
    """Exact positions and distances of normal patches and outliers, with 95 % intervals, chance and fixed answers."""
    figure, grid = panels(1, 2, width=3.2, height=3.0)
    fixed = [one for one in (found.normal_fixed, found.outlier_fixed) if one is not None]
    draw_panel(grid[0, 0], found.top1, "positions named exactly", found.chance_top1, [one.top1 for one in fixed])
    draw_panel(grid[0, 1], found.distance, "mean distance, patches", found.chance_distance, [o.distance for o in fixed])
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    return figure


def draw_panel(axes: Axes, values: ByKind, label: str, chance: float, fixed: Sequence[float]) -> None:
    """Bars of both kinds with what takes no look at a token."""
    draw_kinds(axes, values, label)
    axes.axhline(chance, color="gray", linestyle="--", linewidth=1, label="chance")
    places = np.arange(len(fixed))
    axes.hlines(fixed, places - 0.4, places + 0.4, color="black", linestyle=":", label="best fixed answer")
