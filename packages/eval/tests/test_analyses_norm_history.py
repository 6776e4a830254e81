import numpy as np
import pytest
import torch
from scipy.stats import kurtosis, median_abs_deviation
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_eval.analyses.norm_history import (
    EDGES,
    QUANTILES,
    norm_history,
    plot_model_norms,
    plot_norm_history,
    summarise_norms,
)


def norms(outliers: int, seed: int = 0, median: float = 20.0) -> Tensor:
    """Log-normal norms of 32 images, with a number of outliers of about eight times the median in each."""
    values = (0.15 * torch.randn(32, 100, generator=torch.Generator().manual_seed(seed))).exp() * median
    values[:, :outliers] *= 8
    return values


def test_statistics_equal_scipy() -> None:
    values = norms(0)
    found = summarise_norms(values)
    flat = values.double().numpy()
    np.testing.assert_allclose(found.quantiles, np.percentile(flat, [0, 1, 25, 50, 75, 90, 98, 99.9, 100]))
    assert found.mad == pytest.approx(median_abs_deviation(flat, axis=None))
    logs = np.log(flat)
    assert found.kurtosis == pytest.approx(kurtosis((logs - np.median(logs, axis=1, keepdims=True)).ravel()), abs=1e-6)
    np.testing.assert_array_equal(found.counts, np.histogram(flat, EDGES)[0])
    assert (found.images, found.found, found.outlier_fraction, found.cutoff) == (32, False, 0.0, None)
    assert len(QUANTILES) == len(found.quantiles)


def test_norms_beyond_the_bins_still_count() -> None:
    values = norms(0) * 1e6
    assert summarise_norms(values).counts.sum() == values.numel()


def test_a_planted_mode_comes_back() -> None:
    found = summarise_norms(norms(3))
    assert found.found
    assert found.outlier_fraction == pytest.approx(0.03)
    assert found.cutoff is not None
    assert 30 < found.cutoff < 120
    assert found.kurtosis > 5


def test_outliers_emerge_where_a_second_checkpoint_confirms_them() -> None:
    counts = (0, 3, 0, 2, 4)  # the lone one at step 20 is chance
    summaries = [summarise_norms(norms(count, seed)) for seed, count in enumerate(counts)]
    history = norm_history([10, 20, 30, 40, 50], summaries)
    assert history.emergence_step == 40
    assert norm_history([10, 20], summaries[:2]).emergence_step is None
    np.testing.assert_allclose([one.outlier_fraction for one in history.checkpoints], [0, 0.03, 0, 0.02, 0.04])


def test_steps_must_fit() -> None:
    one = summarise_norms(norms(0))
    with pytest.raises(InputError, match="1 steps and 2 checkpoints; give one step for every checkpoint"):
        norm_history([1], [one, one])
    with pytest.raises(InputError, match="step 1 comes after step 3; give checkpoints by increasing step"):
        norm_history([3, 1], [one, one])


def test_the_plots_show_emergence_and_shares() -> None:
    summaries = [summarise_norms(norms(count)) for count in (0, 3, 3)]
    figure = plot_norm_history(norm_history([5, 10, 15], summaries))
    marked = [line for line in figure.axes[0].lines if line.get_label() == "outliers emerge"]
    assert list(marked[0].get_xdata()) == [10, 10]
    shares = next(line for line in figure.axes[1].lines if line.get_label() == "outliers, % of patches")
    np.testing.assert_allclose(shares.get_ydata(), [0, 3, 3])
    labels = [label.get_text() for label in plot_model_norms(["S", "g"], summaries[:2]).axes[0].get_xticklabels()]
    assert labels == ["S\nno outliers", "g\n3 % outliers"]
