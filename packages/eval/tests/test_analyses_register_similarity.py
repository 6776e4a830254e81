import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from vitreg_eval.analyses import register_similarity
from vitreg_eval.analyses.register_similarity import PUBLISHED, map_similarity, similarity_curve, similarity_sums


def test_similarities_equal_scipy_and_numpy() -> None:
    torch.manual_seed(0)
    maps = torch.rand(5, 4, 3, 6)
    found = map_similarity(similarity_sums(maps), class_token=True)
    flat = maps.flatten(2).double().numpy()
    np.testing.assert_allclose(found.cosine, np.mean([1 - cdist(one, one, "cosine") for one in flat], axis=0))
    np.testing.assert_allclose(found.pearson, np.mean([np.corrcoef(one) for one in flat], axis=0))
    registers = found.pearson[1:, 1:]
    assert found.mean_pearson == pytest.approx(float(registers.sum() - registers.trace()) / 6)
    assert found.mean_cosine == pytest.approx(float(found.cosine[[1, 1, 2], [2, 3, 3]].mean()))
    assert found.names == ("cls", "register 0", "register 1", "register 2")


def test_identical_registers_are_alike_and_opposite_ones_are_not() -> None:
    one = torch.tensor([[1.0, 2], [3, 4]])
    same = map_similarity(similarity_sums(torch.stack([one, 7 * one])[None]), class_token=False)
    assert (same.mean_cosine, same.mean_pearson) == (pytest.approx(1), pytest.approx(1))
    opposite = map_similarity(similarity_sums(torch.stack([one, 5 - one])[None]), class_token=False)
    assert opposite.mean_pearson == pytest.approx(-1)
    assert opposite.mean_cosine == pytest.approx(20 / 30)


def test_an_even_map_has_no_correlation() -> None:
    maps = torch.stack([torch.full((2, 3), 1 / 6), torch.rand(2, 3)])[None]
    found = map_similarity(similarity_sums(maps), class_token=False)
    assert found.mean_pearson == 0
    assert found.mean_cosine is not None
    assert found.mean_cosine > 0


def test_sums_of_batches_are_those_of_the_whole() -> None:
    maps = torch.rand(7, 3, 2, 5)
    whole, parts = similarity_sums(maps), similarity_sums(maps[:3]) + similarity_sums(maps[3:])
    torch.testing.assert_close(parts.pearson, whole.pearson)
    assert parts.images == 7


def test_fewer_than_two_registers_have_no_mean() -> None:
    found = map_similarity(similarity_sums(torch.rand(2, 2, 2, 2)), class_token=True)
    assert found.mean_cosine is None
    assert similarity_curve({0.5: found}).progress == ()


def test_curve_is_in_the_order_of_training() -> None:
    found = {
        progress: map_similarity(similarity_sums(torch.rand(2, 3, 2, 2)), class_token=True) for progress in (1.0, 0.1)
    }
    curve = similarity_curve(found)
    assert curve.progress == (0.1, 1.0)
    assert curve.cosine == (found[0.1].mean_cosine, found[1.0].mean_cosine)
    assert curve.pearson == (found[0.1].mean_pearson, found[1.0].mean_pearson)


def test_published_curve_falls_after_its_first_dip() -> None:
    assert PUBLISHED.cosine[1] == min(PUBLISHED.cosine)
    assert list(PUBLISHED.cosine[2:]) == sorted(PUBLISHED.cosine[2:], reverse=True)
    assert (PUBLISHED.progress[0], PUBLISHED.progress[-1]) == (0, 1)


def test_plots_show_the_numbers() -> None:
    found = map_similarity(similarity_sums(torch.rand(2, 3, 2, 2)), class_token=True)
    figure = register_similarity.plot_similarity(found)
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), found.pearson.numpy())
    assert len(figure.axes[0].texts) == 9
    curves = register_similarity.plot_similarity_curves({"published": PUBLISHED})
    assert tuple(curves.axes[0].lines[0].get_ydata()) == PUBLISHED.cosine
    assert not curves.axes[1].lines
