import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as Theirs
from torch.nn import functional as F
from vitreg_eval.heads import DepthHead, LogisticRegression, SegmentHead, fit_logistic, sig_loss, train_head


def sine(shape: tuple[int, ...], phase: float, scale: float) -> torch.Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(0.7 * steps + phase)).float().reshape(shape)


def clusters(count: int, classes: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, dim, generator=generator), labels


def test_logistic_regression_reaches_the_optimum_of_scikit_learn() -> None:
    features, labels = clusters(400, 4, 12, 0)
    penalty = 1e-2
    ours = LogisticRegression(features, labels, 4, penalty)
    inputs = (features - features.mean(dim=0)) / features.std(dim=0)
    theirs = Theirs(C=1 / (penalty * len(labels)), tol=1e-8, max_iter=2000).fit(inputs.numpy(), labels.numpy())

    def objective(weight: torch.Tensor, bias: torch.Tensor) -> float:
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels)
        return (loss + penalty / 2 * weight.square().sum()).item()

    best = objective(*(torch.from_numpy(values).float() for values in (theirs.coef_, theirs.intercept_)))
    assert objective(ours.linear.weight, ours.linear.bias) == pytest.approx(best, abs=1e-5)
    fresh, _ = clusters(300, 4, 12, 1)
    scaled = ((fresh - features.mean(dim=0)) / features.std(dim=0)).numpy()
    assert (ours(fresh).argmax(dim=-1).numpy() == theirs.predict(scaled)).mean() > 0.99


def test_the_penalty_is_chosen_without_the_test_set_and_chance_stays_chance() -> None:
    features, labels = clusters(600, 4, 12, 0)
    fresh, truth = clusters(2000, 4, 12, 1)
    probe, penalty = fit_logistic(features, labels, 4, seed=0)
    assert 1e-5 <= penalty <= 1e-1
    assert (probe(fresh).argmax(dim=-1) == truth).float().mean() > 0.6
    blind = []
    for seed in range(12):
        shuffled = labels[torch.randperm(600, generator=torch.Generator().manual_seed(seed))]
        blind.append((fit_logistic(features, shuffled, 4, seed)[0](fresh).argmax(dim=-1) == truth).float().mean())
    assert abs(torch.stack(blind).mean() - 0.25) < 0.08


def test_depth_head_equals_the_golden_values() -> None:
    """reference/dinov2.md 6.7, with the class token beside every patch and features enlarged four times first."""
    head = DepthHead(12, bins=8)
    assert head.conv.bias is not None
    with torch.no_grad():
        head.conv.weight.copy_(sine((8, 12, 1, 1), 0, 0.5))
        head.conv.bias.copy_(sine((8,), 1, 0.1))
        patches, cls = sine((1, 6, 3, 4), 0.3, 1), sine((1, 6), 0.9, 1)
        joined = torch.cat([patches, cls[:, :, None, None].expand(-1, -1, 3, 4)], dim=1)
        depth = head(F.interpolate(joined, scale_factor=4, mode="bilinear"), (12, 16))
    expected = torch.tensor([5.314207, 5.314207, 5.308551, 5.297103, 5.285470])
    torch.testing.assert_close(depth[0, 5, :5], expected, rtol=0, atol=2e-4)
    assert abs(depth.mean().item() - 5.356826) < 2e-4


def test_depth_loss_equals_the_golden_value() -> None:
    predicted, truth = 2 + sine((1, 6, 7), 0.2, 1), 2 + sine((1, 6, 7), 1.1, 1)
    truth[0, 0, :3] = 0
    truth[0, 1, 0] = 11
    assert sig_loss(predicted, truth).item() == pytest.approx(0.342929, abs=1e-5)


def test_a_segmentation_head_finds_classes_that_are_in_the_features() -> None:
    generator = np.random.default_rng(0)
    coarse = torch.from_numpy(generator.integers(0, 3, (64, 4, 4)))
    masks = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    features = F.one_hot(coarse, 5).permute(0, 3, 1, 2).float() + 0.1 * torch.randn(64, 5, 4, 4)
    torch.manual_seed(0)
    head = SegmentHead(5, 3)
    train_head(head, features, masks, F.cross_entropy, steps=150, seed=0, batch_size=32)
    assert not head.training
    centres = head(features, (32, 32)).argmax(dim=1)[:, 4::8, 4::8]
    assert (centres == coarse).float().mean() > 0.95


def test_the_same_seed_trains_the_same_head() -> None:
    features, masks = torch.randn(32, 5, 2, 2), torch.randint(0, 3, (32, 4, 4))
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        head = SegmentHead(5, 3)
        train_head(head, features, masks, F.cross_entropy, steps=3, seed=seed, batch_size=8)
        weights.append(head.conv.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
