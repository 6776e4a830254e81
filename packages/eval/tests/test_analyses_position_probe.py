import time

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_eval.analyses.kinds import kind_mean, mean_by_kind, ratio_of_kinds
from vitreg_eval.analyses.position_probe import discriminant, plot_position_probe, probe_positions
from vitreg_eval.analyses.splits import split_images

GRID = (4, 5)


def planted(images: int = 60, dims: int = 24, share: float = 0.15) -> tuple[Tensor, Tensor]:
    """Normal tokens encode their position exactly, outliers are noise at random places."""
    generator = torch.Generator().manual_seed(0)
    outliers = torch.rand(images, 20, generator=generator) < share
    codes = torch.randn(20, dims, generator=generator)
    noise = torch.randn(images, 20, dims, generator=generator)
    return torch.where(outliers[..., None], 3 * noise, codes + 0.05 * noise), outliers


def test_normal_tokens_that_encode_their_place_are_found_and_noise_is_not() -> None:
    tokens, outliers = planted()
    found = probe_positions(tokens, outliers, GRID)
    assert found.top1.normal is not None
    assert found.top1.outlier is not None
    assert found.distance.normal is not None
    assert found.distance.outlier is not None
    assert found.top1.normal.metric.value == 1
    assert found.distance.normal.metric.value == 0
    assert found.top1.outlier.metric.value < 0.2  # chance .05
    assert found.distance.outlier.metric.value == pytest.approx(found.chance_distance, rel=0.25)
    assert (found.train_images, found.test_images) == (48, 12)
    tested = outliers[split_images(60, 0).test]
    assert found.top1.outlier.tokens == int(tested.sum())
    assert found.top1.normal.tokens == int((~tested).sum())
    assert found.top1.outlier.metric.n == int(tested.any(dim=1).sum())


def test_chance_is_that_of_the_paper_s_grid() -> None:
    tokens = torch.randn(10, 256, 3, generator=torch.Generator().manual_seed(0))
    found = probe_positions(tokens, torch.zeros(10, 256, dtype=torch.bool), (16, 16))
    assert found.chance_top1 == pytest.approx(0.0039, abs=5e-5)
    assert found.chance_distance == pytest.approx(8.3, abs=0.05)
    assert found.top1.outlier is None
    assert found.outlier_fixed is None


def test_outliers_that_keep_to_one_place_are_no_better_than_a_fixed_answer() -> None:
    tokens, _ = planted(share=0.0)
    outliers = torch.zeros(60, 20, dtype=torch.bool)
    outliers[:, 7] = True
    tokens = torch.where(outliers[..., None], torch.full((24,), 5.0), tokens)
    found = probe_positions(tokens, outliers, GRID)
    assert found.top1.outlier is not None
    assert found.outlier_fixed is not None
    assert found.normal_fixed is not None
    assert found.top1.outlier.metric.value == 1
    assert (found.outlier_fixed.top1, found.outlier_fixed.distance) == (1, 0)
    assert found.normal_fixed.top1 == pytest.approx(1 / 19)


def test_the_start_is_scikit_learn_s_discriminant() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(50, 6, 4) + torch.randn(6, 4)
    weight, bias = discriminant(tokens)
    flat, labels = tokens.reshape(-1, 4).numpy(), np.tile(np.arange(6), 50)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(6, 1 / 6)).fit(flat, labels)
    ours = (torch.from_numpy(flat) @ weight.T + bias).argmax(dim=1).numpy()
    assert (ours == theirs.predict(flat)).mean() > 0.98  # a little shrinkage apart


def test_no_image_is_in_two_parts() -> None:
    split = split_images(25, 3)
    assert [len(split.train), len(split.val), len(split.test)] == [18, 2, 5]
    assert torch.cat([split.train, split.val, split.test]).sort().values.tolist() == list(range(25))
    with pytest.raises(InputError, match="a probe on 9 images; give 10 or more"):
        split_images(9, 0)


def test_the_probe_is_the_same_for_the_same_seed_and_leaves_the_generator_alone() -> None:
    tokens, outliers = planted(images=20)
    state = torch.get_rng_state()
    assert probe_positions(tokens, outliers, GRID, seed=4) == probe_positions(tokens, outliers, GRID, seed=4)
    assert torch.equal(state, torch.get_rng_state())


def test_means_by_kind_are_over_tokens_and_their_intervals_over_images() -> None:
    values = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    outliers = torch.tensor([[False, False, True], [True, True, True], [False, False, False]])
    found = mean_by_kind(values, outliers)
    assert found.outlier is not None
    assert found.normal is not None
    assert (found.outlier.metric.value, found.outlier.tokens, found.outlier.metric.n) == (4.5, 4, 2)
    assert (found.normal.metric.value, found.normal.tokens, found.normal.metric.n) == (5.4, 5, 2)
    assert found.outlier.metric.ci95 == (3.0, 5.0)  # the three resamples of two images give 3, 4.5 and 5
    assert kind_mean(values, torch.zeros_like(outliers)) is None
    ratio = ratio_of_kinds(values, outliers)
    assert ratio is not None
    assert (ratio.value, ratio.n, ratio.ci95) == (2.0, 1, None)  # the first image alone has both: 3 over 1.5
    assert ratio_of_kinds(values, torch.zeros_like(outliers)) is None


def test_the_plot_shows_both_kinds() -> None:
    tokens, outliers = planted(images=20)
    figure = plot_position_probe(probe_positions(tokens, outliers, GRID))
    assert [len(axes.patches) for axes in figure.axes] == [2, 2]
    assert figure.axes[0].patches[0].get_height() == 1


def test_a_usual_set_takes_seconds() -> None:
    """A tenth of 400 images of a ViT-Ti/16 in a tenth of 15 seconds, and room for a busy machine."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(40, 196, 192, generator=generator) + torch.randn(196, 192, generator=generator)
    start = time.process_time()
    probe_positions(tokens, torch.zeros(40, 196, dtype=torch.bool), (14, 14))
    assert time.process_time() - start < 5


def test_distances_are_euclidean() -> None:
    """Outliers in the first corner that carry the code of the last are three rows and four columns off: 5 patches."""
    tokens, _ = planted(share=0.0)
    outliers = torch.zeros(60, 20, dtype=torch.bool)
    outliers[::6, 0] = True
    tokens[::6, 0] = tokens[::6, 19]
    found = probe_positions(tokens, outliers, GRID, seed=1)
    assert found.distance.outlier is not None
    assert found.distance.outlier.metric.value == 5
