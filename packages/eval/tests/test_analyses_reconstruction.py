import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.errors import InputError
from vitreg_eval.analyses.reconstruction import (
    RidgeSums,
    StudyMlp,
    fit_ridge,
    patchify,
    plot_reconstruction,
    reconstruct_by_mlp,
    reconstruct_linearly,
    residual_norms,
)
from vitreg_eval.analyses.splits import split_images


def planted(images: int = 40, share: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """Normal tokens hold their pixels exactly under a rotation, outliers are noise."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(images, 9, 12, generator=generator)
    outliers = torch.rand(images, 9, generator=generator) < share
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    noise = torch.randn(images, 9, 12, generator=generator)
    return torch.where(outliers[..., None], 1e-3 * noise, patches @ rotation), patches, outliers


def summed(tokens: Tensor, patches: Tensor, batch: int = 3) -> RidgeSums:
    sums = RidgeSums(tokens.shape[2], patches.shape[2])
    for part in torch.arange(len(tokens)).split(batch):
        sums.add(tokens[part], patches[part])
    return sums


def test_patches_equal_torch_s_unfold_and_drop_the_rest() -> None:
    images = torch.arange(2 * 3 * 9 * 13).reshape(2, 3, 9, 13).float()
    theirs = F.unfold(images, 4, stride=4).unflatten(1, (3, 16)).permute(0, 3, 2, 1).flatten(2)
    torch.testing.assert_close(patchify(images, 4), theirs)


@pytest.mark.parametrize("strength", [1e-4, 1.0])
def test_ridge_equals_scikit_learn(strength: float) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(20, 5, 6) * torch.tensor([5.0, 1, 1, 1, 1, 0.1]) + 3
    patches = tokens @ torch.randn(6, 4) + torch.randn(20, 5, 4)
    flat, target = tokens.reshape(-1, 6).double().numpy(), patches.reshape(-1, 4).double().numpy()
    theirs = Ridge(alpha=strength * flat.var(axis=0).mean() * len(flat)).fit(flat, target)
    ours = summed(tokens, patches).solve(strength)
    np.testing.assert_allclose(ours(tokens.reshape(-1, 6)).numpy(), theirs.predict(flat), atol=1e-4)


def test_the_error_from_sums_is_that_of_the_tokens() -> None:
    torch.manual_seed(0)
    tokens, patches = torch.randn(12, 5, 6) + 2, torch.randn(12, 5, 4) - 1
    linear = summed(tokens[:8], patches[:8]).solve(0.1)
    direct = (linear(tokens[8:]) - patches[8:]).square().mean()
    assert summed(tokens[8:], patches[8:]).error(linear) == pytest.approx(float(direct), rel=1e-5)


def test_the_penalty_is_chosen_on_validation_images() -> None:
    """Five images of pure noise: the more is penalised, the better elsewhere."""
    torch.manual_seed(0)
    tokens, patches = torch.randn(40, 2, 8), torch.randn(40, 2, 3)
    assert fit_ridge(summed(tokens[:5], patches[:5]), summed(tokens[5:], patches[5:])).strength == 100
    exact = tokens @ torch.randn(8, 3)
    assert fit_ridge(summed(tokens[:20], exact[:20]), summed(tokens[20:], exact[20:])).strength == 1e-6
    with pytest.raises(InputError, match="0 tokens to fit on and 70 to choose by; give images to both"):
        fit_ridge(RidgeSums(8, 3), summed(tokens[5:], patches[5:]))


def test_tokens_that_hold_their_pixels_leave_nothing_and_outliers_everything() -> None:
    tokens, patches, outliers = planted()
    found = reconstruct_linearly(tokens, patches, outliers)
    assert found.error.normal is not None
    assert found.error.outlier is not None
    assert found.reference.outlier is not None
    assert found.error.normal.metric.value < 0.1
    assert found.error.outlier.metric.value == pytest.approx(found.reference.outlier.metric.value, rel=0.01)
    assert found.error.outlier.metric.value == pytest.approx(np.sqrt(12), rel=0.1)
    tested = split_images(40, 0).test
    assert found.test_images == len(tested) == 8
    assert found.error.outlier.tokens == int(outliers[tested].sum())


def test_the_reference_is_the_length_to_the_mean_training_patch() -> None:
    """As the paper's 24.2 for 14 x 14 x 3 values of unit variance."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(30, 4, 588, generator=generator) + 5
    tokens = torch.randn(30, 4, 2, generator=generator)
    found = reconstruct_linearly(tokens, patches, torch.zeros(30, 4, dtype=torch.bool))
    assert found.reference.normal is not None
    assert found.reference.normal.metric.value == pytest.approx(24.2, abs=0.3)
    assert found.reference.outlier is None


def test_residuals_are_lengths_not_squares() -> None:
    linear = summed(torch.randn(9, 2, 3), torch.zeros(9, 2, 4)).solve(1.0)
    torch.testing.assert_close(
        residual_norms(linear, torch.zeros(1, 1, 3), torch.full((1, 1, 4), 3.0)), torch.tensor([[6.0]])
    )


def test_the_mlp_learns_what_normal_tokens_hold() -> None:
    tokens, patches, outliers = planted(images=2000)
    found = reconstruct_by_mlp(tokens, patches, outliers)
    assert found.error.normal is not None
    assert found.error.outlier is not None
    assert found.reference.normal is not None
    assert found.ratio is not None
    assert found.error.normal.metric.value < 0.6 * found.reference.normal.metric.value
    assert found.error.outlier.metric.value == pytest.approx(1, abs=0.2)
    assert found.ratio.value == pytest.approx(
        found.error.outlier.metric.value / found.error.normal.metric.value, rel=0.05
    )
    assert found.reference.normal.metric.value == pytest.approx(1, abs=0.1)


def test_the_mlp_has_the_study_s_shapes_and_draws_from_its_seed() -> None:
    mlp = StudyMlp(torch.randn(2, 3, 384), 768)
    assert [tuple(layer.weight.shape) for layer in (mlp.fc1, mlp.fc2)] == [(1536, 384), (768, 1536)]
    tokens, patches, outliers = planted(images=12)
    state = torch.get_rng_state()
    assert reconstruct_by_mlp(tokens, patches, outliers, seed=2) == reconstruct_by_mlp(
        tokens, patches, outliers, seed=2
    )
    assert torch.equal(state, torch.get_rng_state())


def test_the_plot_has_a_panel_for_each_model() -> None:
    tokens, patches, outliers = planted()
    linear, mlp = reconstruct_linearly(tokens, patches, outliers), reconstruct_by_mlp(tokens, patches, outliers)
    assert len(plot_reconstruction(linear).axes) == 2
    assert [len(axes.patches) for axes in plot_reconstruction(linear, mlp).axes] == [2, 2, 2]
