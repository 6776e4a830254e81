"""Can a patch's pixels be read off its token? (registers paper, figure 5b, reconstruction; study, section 4.2.1).

The paper's linear model is a ridge regression in closed form here. The study's MLP is given true patches, one
definition of a token for training and for judging, and a mean squared error, none of which its code has; its published
ratio of 1.47 is no target.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from vitreg_core.errors import InputError

from vitreg_eval.analyses.kinds import ByKind, draw_kinds, mean_by_kind, ratio_of_kinds
from vitreg_eval.analyses.panels import panels
from vitreg_eval.analyses.splits import split_images
from vitreg_eval.metrics import Metric

STRENGTHS = tuple(10.0**power for power in range(-6, 3))
"""Ridge penalties that are tried, in units of the mean variance of the token's dimensions."""
IMAGES_AT_ONCE = 32
EPOCHS, BATCH, LEARNING_RATE = 5, 512, 1e-3


@dataclass(frozen=True)
class LinearReconstruction:
    """Length of what a linear map from token to pixels leaves of a patch, on images that it was not fitted on."""

    error: ByKind
    """Mean over the tokens of the L2 norm (not squared) of the residual, in standardised pixels."""
    reference: ByKind
    """The same when the mean patch of the training images stands for every patch: nothing known."""
    strength: float
    """Chosen penalty, one of `STRENGTHS`."""
    test_images: int


@dataclass(frozen=True)
class MlpReconstruction:
    """Squared error of the study's MLP, on images that it was not trained on."""

    error: ByKind
    """Mean squared error per value of a patch, in standardised pixels."""
    reference: ByKind
    """The same when the mean patch of the training images stands for every patch: nothing known."""
    ratio: Metric | None
    """Error of outliers over that of normal patches, on the images that have both; None without any."""
    test_images: int


@dataclass(frozen=True)
class LinearMap:
    """From a token to the pixels of its patch."""

    weight: Float[Tensor, "d values"]
    token_mean: Float[Tensor, " d"]
    patch_mean: Float[Tensor, " values"]
    strength: float

    def __call__(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n values"]:
        """Predicted pixels."""
        return (tokens - self.token_mean) @ self.weight + self.patch_mean


class RidgeSums:
    """All that a ridge regression needs of any number of tokens, in memory that does not grow with them."""

    def __init__(self, embed_dim: int, values: int) -> None:
        self.count = 0
        self.token_sum = torch.zeros(embed_dim, dtype=torch.float64)
        self.patch_sum = torch.zeros(values, dtype=torch.float64)
        self.squares = torch.zeros(embed_dim, embed_dim, dtype=torch.float64)  # d d
        self.products = torch.zeros(embed_dim, values, dtype=torch.float64)  # d values
        self.patch_squares = 0.0

    def add(self, tokens: Float[Tensor, "b p d"], patches: Float[Tensor, "b p values"]) -> None:
        """Take in a batch: tokens, and pixels from `patchify`."""
        token, patch = (rearrange(one, "b p values -> (b p) values").cpu().double() for one in (tokens, patches))
        self.count += len(token)
        self.token_sum += token.sum(dim=0)
        self.patch_sum += patch.sum(dim=0)
        self.squares += token.T @ token
        self.products += token.T @ patch
        self.patch_squares += float(patch.square().sum())

    def solve(self, strength: float) -> LinearMap:
        """The map of least squared error, its weights penalised."""
        token_mean, patch_mean = self.token_sum / self.count, self.patch_sum / self.count
        covariance = self.squares / self.count - torch.outer(token_mean, token_mean)
        shared = self.products / self.count - torch.outer(token_mean, patch_mean)
        covariance.diagonal().add_(strength * covariance.diagonal().mean().clamp_min(1e-12))
        weight = torch.linalg.solve(covariance, shared)
        return LinearMap(weight.float(), token_mean.float(), patch_mean.float(), strength)

    def error(self, linear: LinearMap) -> float:
        """Mean squared error of a map on these tokens, without seeing them again."""
        weight = linear.weight.double()
        offset = linear.patch_mean.double() - linear.token_mean.double() @ weight
        squared = (
            self.patch_squares
            - 2 * float((self.products * weight).sum() + self.patch_sum @ offset)
            + float((self.squares @ weight * weight).sum())
            + 2 * float(self.token_sum @ weight @ offset)
            + self.count * float(offset @ offset)
        )
        return squared / (self.count * len(offset))


def patchify(images: Float[Tensor, "b 3 height width"], patch_size: int) -> Float[Tensor, "b p values"]:
    """Pixels of every patch, row by row as the tokens; pixels beyond the last whole patch are dropped.

    Args:
        images: normalised by the model's own mean and standard deviation.
        patch_size: side of a patch in pixels.
    """
    rows, cols = (side // patch_size for side in images.shape[-2:])
    whole = images[..., : rows * patch_size, : cols * patch_size]
    return rearrange(whole, "b c (rows y) (cols x) -> b (rows cols) (y x c)", y=patch_size, x=patch_size)


def sum_up(
    tokens: Float[Tensor, "b p d"], patches: Float[Tensor, "b p values"], images: Int[Tensor, " n"]
) -> RidgeSums:
    """Sums over some of the images."""
    sums = RidgeSums(tokens.shape[2], patches.shape[2])
    for chosen in images.split(IMAGES_AT_ONCE):
        sums.add(tokens[chosen], patches[chosen])
    return sums


def fit_ridge(train: RidgeSums, val: RidgeSums, strengths: Sequence[float] = STRENGTHS) -> LinearMap:
    """The map whose penalty has the least squared error on validation images.

    Raises:
        InputError: no tokens to fit on or to choose on.
    """
    if not train.count or not val.count:
        raise InputError(f"{train.count} tokens to fit on and {val.count} to choose by; give images to both")
    return min((train.solve(strength) for strength in strengths), key=val.error)


def residual_norms(
    linear: LinearMap, tokens: Float[Tensor, "b p d"], patches: Float[Tensor, "b p values"]
) -> Float[Tensor, "b p"]:
    """L2 norm of what the map leaves of every patch."""
    return (linear(tokens.cpu().float()) - patches.cpu().float()).norm(dim=-1)


def reconstruct_linearly(
    tokens: Float[Tensor, "b p d"],
    patches: Float[Tensor, "b p values"],
    outliers: Bool[Tensor, "b p"],
    *,
    seed: int = 0,
) -> LinearReconstruction:
    """Fit a ridge regression on the tokens of 80 % of the images; judge it by those of the others.

    Args:
        tokens: of one block, after the final norm for the last.
        patches: pixels from `patchify`, standardised.
        outliers: which patches are outliers. The regression does not know.
        seed: of the split and the intervals over images.

    Raises:
        InputError: fewer than ten images.
    """
    split = split_images(len(tokens), seed)
    train, val = (sum_up(tokens, patches, part) for part in (split.train, split.val))
    linear = fit_ridge(train, val)
    tested = split.test.split(IMAGES_AT_ONCE)
    errors = [residual_norms(linear, tokens[images], patches[images]) for images in tested]
    unknown = [(patches[images].cpu().float() - linear.patch_mean).norm(dim=-1) for images in tested]
    judged = outliers[split.test].cpu()
    return LinearReconstruction(
        error=mean_by_kind(torch.cat(errors), judged, seed=seed),
        reference=mean_by_kind(torch.cat(unknown), judged, seed=seed),
        strength=linear.strength,
        test_images=len(split.test),
    )


def reconstruct_by_mlp(
    tokens: Float[Tensor, "b p d"],
    patches: Float[Tensor, "b p values"],
    outliers: Bool[Tensor, "b p"],
    *,
    seed: int = 0,
) -> MlpReconstruction:
    """Train the study's MLP on all tokens of 80 % of the images; judge it by those of the others.

    One hidden layer of four times the width of a token, five epochs of AdamW at 1e-3 on the mean squared error. The
    study does not name the activation, GELU here; tokens are standardised first.

    Args:
        tokens: of one block, after the final norm for the last.
        patches: pixels from `patchify`, standardised.
        outliers: which patches are outliers. The MLP does not know.
        seed: of the split, the weights, the order of the tokens and the intervals over images.

    Raises:
        InputError: fewer than ten images.
    """
    split = split_images(len(tokens), seed)
    fitted = torch.cat([split.train, split.val])
    mean_patch = torch.stack([patches[index].double().mean(dim=0) for index in fitted]).mean(dim=0).float()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mlp = StudyMlp(tokens[fitted].float(), patches.shape[2]).to(tokens.device)
        train_mlp(mlp, tokens, patches, fitted)
    with torch.no_grad():
        errors = [(mlp(tokens[index].float()) - patches[index]).square().mean(dim=-1) for index in split.test]
    unknown = [(patches[index] - mean_patch).square().mean(dim=-1) for index in split.test]
    values, judged = torch.stack(errors), outliers[split.test].to(tokens.device)
    return MlpReconstruction(
        error=mean_by_kind(values, judged, seed=seed),
        reference=mean_by_kind(torch.stack(unknown), judged, seed=seed),
        ratio=ratio_of_kinds(values, judged, seed=seed),
        test_images=len(split.test),
    )


class StudyMlp(nn.Module):
    """The study's network, 384 to 1536 to 768 for a ViT-S/16, behind a standardisation of the tokens."""

    mean: Tensor
    std: Tensor

    def __init__(self, tokens: Float[Tensor, "b p d"], values: int) -> None:
        super().__init__()
        embed_dim = tokens.shape[2]
        self.register_buffer("mean", tokens.mean(dim=(0, 1)))
        self.register_buffer("std", tokens.std(dim=(0, 1), correction=0).clamp_min(1e-6))
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, values)

    def forward(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n values"]:
        """Predicted pixels."""
        return self.fc2(F.gelu(self.fc1((tokens - self.mean) / self.std)))


def train_mlp(
    mlp: StudyMlp, tokens: Float[Tensor, "b p d"], patches: Float[Tensor, "b p values"], images: Int[Tensor, " n"]
) -> None:
    """Minimise the mean squared error over the tokens of some images in random order."""
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=LEARNING_RATE)
    count = tokens.shape[1]
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images) * count).split(BATCH):
            image, patch = images[chosen // count], chosen % count
            optimizer.zero_grad()
            F.mse_loss(mlp(tokens[image, patch].float()), patches[image, patch].float()).backward()
            optimizer.step()


def plot_reconstruction(linear: LinearReconstruction, mlp: MlpReconstruction | None = None) -> Figure:
    """Errors of normal patches and outliers with their 95 % intervals, beside what is left when nothing is known."""
    figure, grid = panels(1, 2 if mlp is None else 3, width=3.2, height=2.8)
    draw_kinds(grid[0, 0], linear.error, "L2 norm of the residual")
    draw_kinds(grid[0, 1], linear.reference, "L2 norm of the residual")
    top = max(axes.get_ylim()[1] for axes in grid[0, :2])
    for axes, title in zip(grid[0], ("linear", "mean patch (nothing known)"), strict=False):
        axes.set_ylim(0, top)
        axes.set_title(title, fontsize=9)
    if mlp is not None:
        draw_kinds(grid[0, 2], mlp.error, "mean squared error")
        ratio = "" if mlp.ratio is None else f", ratio {mlp.ratio.value:.2f}"
        grid[0, 2].set_title(f"MLP{ratio}", fontsize=9)
    return figure
