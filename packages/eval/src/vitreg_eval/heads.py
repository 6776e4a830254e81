"""Heads that are trained on frozen features: logistic regression, linear segmentation, linear depth."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
MIN_DEPTH, MAX_DEPTH, BINS = 1e-3, 10.0, 256


class LogisticRegression(nn.Module):
    """Softmax regression on standardised features, fitted by L-BFGS to the optimum of mean loss plus L2 penalty."""

    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]

    def __init__(self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int, penalty: float) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(dim=0))
        self.register_buffer("std", features.std(dim=0).clamp_min(1e-6))
        self.linear = nn.Linear(features.shape[1], classes)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.fit((features - self.mean) / self.std, labels, penalty)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        return self.linear((features - self.mean) / self.std)

    def fit(self, inputs: Float[Tensor, "n d"], labels: Int[Tensor, " n"], penalty: float) -> None:
        """Minimise the penalised loss."""
        optimizer = torch.optim.LBFGS(
            self.parameters(), max_iter=200, tolerance_grad=1e-6, history_size=10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.linear(inputs), labels) + penalty / 2 * self.linear.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


def fit_logistic(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int, seed: int
) -> tuple[LogisticRegression, float]:
    """Fit with the penalty that does best on a fifth of the training set, then on all of it.

    Returns:
        The fitted model and the penalty.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]

    def accuracy(penalty: float) -> float:
        fitted = LogisticRegression(features[rest], labels[rest], classes, penalty)
        with torch.no_grad():
            return float((fitted(features[held_out]).argmax(dim=-1) == labels[held_out]).float().mean())

    best = max(PENALTIES, key=accuracy)
    return LogisticRegression(features, labels, classes, best), best


class SegmentHead(nn.Module):
    """Batch norm and one linear layer on every patch; logits are enlarged to the image (DINOv2, linear head)."""

    def __init__(self, embed_dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(embed_dim)
        self.conv = nn.Conv2d(embed_dim, classes, kernel_size=1)
        initialise(self.conv)

    def forward(
        self, features: Float[Tensor, "b d rows cols"], size: tuple[int, int]
    ) -> Float[Tensor, "b classes height width"]:
        """Logits at image size."""
        return F.interpolate(self.conv(self.norm(features)), size=size, mode="bilinear")


class DepthHead(nn.Module):
    """One linear layer to weights over 256 depths, whose mean is the depth in metres.

    As the linear head of DINOv2, but depths are enlarged to the image, not features by four before the layer.
    """

    bins: Float[Tensor, " bins"]

    def __init__(self, embed_dim: int, bins: int = BINS) -> None:
        super().__init__()
        self.conv = nn.Conv2d(embed_dim, bins, kernel_size=1)
        initialise(self.conv)
        self.register_buffer("bins", torch.linspace(MIN_DEPTH, MAX_DEPTH, bins))

    def forward(
        self, features: Float[Tensor, "b d rows cols"], size: tuple[int, int]
    ) -> Float[Tensor, "b height width"]:
        """Depth in metres at image size."""
        weights = self.conv(features).relu() + 0.1
        depth = (weights / weights.sum(dim=1, keepdim=True) * self.bins.view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
        return F.interpolate(depth, size=size, mode="bilinear")[:, 0]


def initialise(conv: nn.Conv2d) -> None:
    """Small weights and no bias, as the linear heads of DINOv2 start."""
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def sig_loss(predicted: Float[Tensor, "b height width"], depth: Float[Tensor, "b height width"]) -> Float[Tensor, ""]:
    """Scale-tolerant loss of log depths over the pixels with a reading: sqrt(var + 0.15 mean^2)."""
    valid = (depth > 0) & (depth <= MAX_DEPTH)
    difference = torch.log(predicted[valid] + 1e-3) - torch.log(depth[valid] + 1e-3)
    return torch.sqrt(difference.var() + 0.15 * difference.mean().square())


def train_head(
    head: nn.Module,
    features: Float[Tensor, "n d rows cols"],
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    seed: int,
    batch_size: int = 64,
) -> None:
    """Train a head on frozen features with AdamW (1e-3, cosine to 0); the head is left in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    size = tuple(targets.shape[-2:])
    head.train()
    for _ in tqdm(range(steps), desc="head", unit="step", disable=None, leave=False):
        chosen = torch.randint(len(features), (batch_size,), generator=generator)
        optimizer.zero_grad()
        loss(head(features[chosen], size), targets[chosen]).backward()
        optimizer.step()
        schedule.step()
    head.eval()
