import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize as scipy_minimize
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from vitreg_core.errors import InputError
from vitreg_eval import logistic
from vitreg_eval.logistic import STRENGTHS, Problem, fit_path


def clusters(count: int, classes: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters off the origin, in directions of very different variance."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (count,), generator=generator)
    features = centres[labels] + 1.5 * torch.randn(count, dim, generator=generator)
    return 3 + features * torch.logspace(0.5, -1, dim), labels


def objective(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, y: torch.Tensor, strength: float) -> float:
    loss = F.cross_entropy(F.linear(x.double(), weight.double(), bias.double()), y, reduction="sum")
    return (strength * loss + weight.double().square().sum() / 2).item()


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1e2])
def test_the_objective_and_predictions_are_those_of_scikit_learn(strength: float) -> None:
    x, y = clusters(400, 5, 12, 0)
    ours = next(fit_path(Problem(x, y, 5), [strength]))
    theirs = LogisticRegression(C=strength, tol=1e-9, max_iter=20000).fit(x.double().numpy(), y.numpy())
    best = objective(torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_), x, y, strength)
    found = objective(ours.weight, ours.bias, x, y, strength)
    assert found <= best * (1 + 1e-6)
    assert ours.objective == pytest.approx(found, rel=1e-9)
    fresh, _ = clusters(300, 5, 12, 1)
    assert (ours.scores(fresh.double()).argmax(dim=1).numpy() == theirs.predict(fresh.double().numpy())).all()


def test_float32_comes_as_close() -> None:
    x, y = clusters(400, 5, 12, 0)
    exact, rough = (next(fit_path(Problem(x, y, 5, dtype=dtype), [1.0])) for dtype in (torch.float64, torch.float32))
    assert objective(rough.weight, rough.bias, x, y, 1.0) <= exact.objective * (1 + 1e-6)


def test_the_whole_path_of_dinov2_is_at_the_optimum_everywhere() -> None:
    np.testing.assert_allclose(STRENGTHS, 10 ** np.linspace(-6, 5, 45), rtol=1e-12)
    x, y = clusters(150, 3, 6, 0)
    path = list(fit_path(Problem(x, y, 3)))
    assert [one.strength for one in path] == list(STRENGTHS)
    for one in (path[0], path[22], path[44]):
        with warnings.catch_warnings(action="ignore"):  # it may stop short of so small a tolerance
            theirs = LogisticRegression(C=one.strength, tol=1e-10, max_iter=5000).fit(x.double().numpy(), y.numpy())
        best = objective(torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_), x, y, one.strength)
        assert one.objective <= best * (1 + 1e-6)
        assert one.passes < 200


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clusters(60, 3, 6, 0)
    whole = next(fit_path(Problem(x, y, 3), [1e-3]))
    monkeypatch.setattr(logistic, "ENTRIES_AT_ONCE", 7 * 25)
    parts = Problem(x, y, 3)
    assert [len(part) for part, _ in parts.chunks()] == [25, 25, 10]
    torch.testing.assert_close(next(fit_path(parts, [1e-3])).weight, whole.weight, rtol=1e-6, atol=1e-9)


def test_classes_that_may_come_together_are_fitted_one_by_one_and_unjudged_ones_left_out() -> None:
    x, first = clusters(300, 2, 5, 0)
    second = (x[:, 0] + torch.randn(300, generator=torch.Generator().manual_seed(1)) > 3).long()
    rows = torch.stack([first, second], dim=1)
    rows[:60, 1] = -1
    ours = next(fit_path(Problem(x, rows, 2), [0.5]))
    for column, keep in enumerate((slice(None), slice(60, None))):
        theirs = LogisticRegression(C=0.5, tol=1e-10, max_iter=5000).fit(
            x[keep].double().numpy(), rows[keep, column].numpy()
        )
        np.testing.assert_allclose(ours.weight[column].numpy(), theirs.coef_[0], rtol=5e-3, atol=5e-4)
        assert ours.bias[column].item() == pytest.approx(theirs.intercept_[0], rel=1e-2, abs=1e-2)


def test_a_feature_that_never_varies_and_one_that_repeats_another_do_no_harm() -> None:
    x, y = clusters(100, 3, 4, 0)
    wide = torch.cat([x, x[:, :1], torch.full((100, 1), 5.0), torch.zeros(100, 1)], dim=1)
    fitted = next(fit_path(Problem(wide, y, 3), [100.0]))
    theirs = LogisticRegression(C=100.0, tol=1e-10, max_iter=20000).fit(wide.double().numpy(), y.numpy())
    best = objective(torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_), wide, y, 100.0)
    assert fitted.objective <= best * (1 + 1e-6)


def test_the_search_finds_what_scipy_finds() -> None:
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 8)))
    matrix = matrix @ matrix.T + 0.1 * torch.eye(8, dtype=torch.float64)

    def bowl(point: torch.Tensor) -> tuple[float, torch.Tensor]:
        value = (point @ matrix @ point) / 2 + (point - 1).pow(4).sum() + 1
        return value.item(), matrix @ point + 4 * (point - 1).pow(3)

    found, value, used = logistic.minimise(bowl, torch.zeros(8, dtype=torch.float64), 500, 1e-14)
    theirs = scipy_minimize(lambda p: bowl(torch.from_numpy(p))[0], np.zeros(8), method="BFGS", tol=1e-12)
    assert value == pytest.approx(theirs.fun, rel=1e-10)
    np.testing.assert_allclose(found.numpy(), theirs.x, atol=1e-4)
    assert used < 200


def test_features_that_are_not_finite_are_refused_and_those_that_float32_cannot_tell_apart_are_not() -> None:
    x, y = clusters(100, 3, 6, 0)
    close = torch.cat([100 * x, 100 * x + 1e-4 * torch.randn_like(x)], dim=1)
    fits = [next(fit_path(Problem(close, y, 3, dtype=dtype), [1e5])) for dtype in (torch.float64, torch.float32)]
    assert all(fit.weight.isfinite().all() for fit in fits)
    x[3, 2] = torch.nan
    with pytest.raises(InputError, match="features that are not finite"):
        next(fit_path(Problem(x, y, 3), [1.0]))


def test_passes_are_limited() -> None:
    x, y = clusters(200, 4, 6, 0)
    fitted = next(fit_path(Problem(x, y, 4), [1e5], passes=5))
    assert fitted.passes <= 6  # one at least in each number type
