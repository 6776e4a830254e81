import numpy as np
import pytest
import torch
from vitreg_core.errors import InputError
from vitreg_eval.analyses.outlier_positions import (
    border_distance,
    concentration,
    draw_maps,
    gini,
    outlier_positions,
    plot_outlier_positions,
    ring_profile,
)


def test_distance_to_the_border() -> None:
    expected = [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 2, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    assert border_distance((5, 5)).tolist() == expected
    assert border_distance((2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_gini_in_closed_form() -> None:
    assert gini(np.ones(10)) == pytest.approx(0)
    assert gini(np.eye(1, 10)[0]) == pytest.approx(0.9)
    assert gini(np.arange(1.0, 5)) == pytest.approx(0.25)
    values = np.random.default_rng(0).exponential(size=40)
    assert gini(values) == pytest.approx(np.abs(values[:, None] - values).mean() / (2 * values.mean()))


def test_stripes_are_those_of_columns_over_rows() -> None:
    columns = np.tile([0.0, 1, 0, 1], (4, 1))
    assert concentration(columns).stripes == np.inf
    assert concentration(columns.T).stripes == 0
    assert concentration(np.full((4, 4), 0.1)).stripes == 1
    map_ = np.random.default_rng(0).random((5, 7))
    assert concentration(map_).stripes == pytest.approx(map_.mean(axis=0).std() / map_.mean(axis=1).std())


def test_a_planted_ring_comes_back() -> None:
    """Ring 1 of a 6 x 6 grid, in half of the images, and one normal image."""
    ring = torch.from_numpy(border_distance((6, 6)) == 1).flatten()
    mask = torch.zeros(8, 36, dtype=torch.bool)
    mask[:4] = ring
    found = outlier_positions(mask, (6, 6), draws=200)
    np.testing.assert_allclose(found.rings, [0, 0.5, 0])
    assert found.share[1, 1] == 0.5
    assert (found.images, found.outliers) == (8, 48)
    assert found.rings[1] > found.rings_by_chance[1, 1]
    assert found.rings[0] < found.rings_by_chance[0, 0]
    assert found.concentration.top_share == pytest.approx(5 / 12)
    assert found.concentration.gini > found.gini_by_chance[1]


def test_what_chance_draws_has_the_mass_and_the_spread_of_sampling_without_replacement() -> None:
    counts = np.array([0, 3, 3, 10, 1, 12])
    drawn = draw_maps(counts, (3, 4), np.random.default_rng(0), 4000)
    assert (drawn.sum(axis=(1, 2)) == counts.sum()).all()
    shares = counts / 12
    np.testing.assert_allclose(drawn.mean(axis=0), shares.sum(), atol=0.06)
    np.testing.assert_allclose(drawn.var(axis=0), (shares * (1 - shares)).sum(), rtol=0.1)  # 12 of 12 never vary
    pairs = np.cov(drawn.reshape(4000, -1).T)
    np.testing.assert_allclose(pairs[0, 1], -(shares * (1 - shares)).sum() / 11, atol=0.02)


def test_of_maps_drawn_by_chance_95_per_cent_lie_within_the_intervals() -> None:
    """Sparse maps look concentrated: their Gini is far from 0, and chance says so."""
    generator = torch.Generator().manual_seed(1)
    inside = []
    for _ in range(60):
        found = outlier_positions(torch.rand(50, 49, generator=generator) < 0.02, (7, 7), draws=100)
        assert found.concentration.gini > 0.3
        pairs = [
            (found.concentration.gini, found.gini_by_chance),
            (found.concentration.top_share, found.top_share_by_chance),
            (found.concentration.stripes, found.stripes_by_chance),
            *zip(found.rings, found.rings_by_chance, strict=True),
        ]
        inside.append([low <= value <= high for value, (low, high) in pairs])
    shares = np.mean(inside, axis=0)
    assert (shares > 0.85).all()
    assert 0.91 < shares.mean() < 0.99


def test_the_same_seed_draws_the_same() -> None:
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(0)) < 0.2
    first, second, other = (outlier_positions(mask, (3, 4), seed=seed, draws=50) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.rings_by_chance, second.rings_by_chance)
    assert first.stripes_by_chance != other.stripes_by_chance


def test_ring_profile_weighs_positions_alike() -> None:
    share = np.arange(12.0).reshape(3, 4)
    np.testing.assert_allclose(ring_profile(share), [(66 - 5 - 6) / 10, 5.5])


def test_without_outliers_there_is_no_map() -> None:
    with pytest.raises(InputError, match="no outliers in 3 images"):
        outlier_positions(torch.zeros(3, 4, dtype=torch.bool), (2, 2))


def test_the_plot_shows_per_cent() -> None:
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[0, 0] = True
    figure = plot_outlier_positions(outlier_positions(mask, (3, 4), draws=20))
    assert figure.axes[0].images[0].get_array().max() == 25
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), [2.5, 0])
