import numpy as np
import pytest
from vitreg_core.config import ViTConfig
from vitreg_eval.analyses.position_gradient import model_position_gradient, plot_position_gradients, position_gradient

HALF = [2.385, 5.365, -0.349, 6.923, -1.018, 6.363, 0.865, 3.967]
FILTERED_HALF = [2.528, 3.443, 3.288, 3.027, 3.030, 3.063, 3.064, 3.056]
OFFSET = [2.509, 5.195, -0.006, 6.789, -1.014, 6.739, 0.106, 5.064]
OFFSET += [2.666, 2.352, 5.321, -0.113, 6.835, -1.007, 6.684, 0.880]


@pytest.mark.parametrize(
    ("antialias", "offset", "columns"),
    [(False, 0.0, HALF + HALF[::-1]), (True, 0.0, FILTERED_HALF + FILTERED_HALF[::-1]), (False, 0.1, OFFSET)],
)
def test_columns_are_those_of_the_figure(offset: float, columns: list[float], *, antialias: bool) -> None:
    """Registers paper, figure 11, 16 x 16 to 7 x 7."""
    found = position_gradient((16, 16), (7, 7), antialias=antialias, offset=offset)
    np.testing.assert_allclose(found.column_sums, columns, atol=6e-4)
    assert found.weights.sum() == pytest.approx(49, rel=1e-5)


def test_without_a_filter_some_positions_count_negatively() -> None:
    plain = position_gradient((16, 16), (7, 7), antialias=False)
    assert plain.negative_share == 0.375
    assert (plain.weights.min(), plain.weights.max()) == pytest.approx((-0.144, 0.978), abs=5e-4)
    filtered = position_gradient((16, 16), (7, 7), antialias=True)
    assert filtered.negative_share == 0
    assert (filtered.weights.min(), filtered.weights.max()) == pytest.approx((0.131, 0.242), abs=6e-4)


def test_a_model_is_shown_with_its_own_resize() -> None:
    config = ViTConfig(
        image_size=(64, 96), patch_size=16, embed_dim=8, num_heads=2, position_antialias=False, position_offset=0.1
    )
    ours = model_position_gradient(config, (3, 4))
    expected = position_gradient((4, 6), (3, 4), antialias=False, offset=0.1)
    np.testing.assert_array_equal(ours.weights, expected.weights)
    assert ours.weights.shape == (4, 6)
    assert (ours.antialias, ours.offset) == (False, 0.1)


def test_the_native_grid_reads_every_position_once() -> None:
    np.testing.assert_array_equal(position_gradient((3, 5), (3, 5), antialias=True).weights, np.ones((3, 5)))


def test_the_plot_has_a_map_and_bars_for_each() -> None:
    pair = [position_gradient((16, 16), (7, 7), antialias=antialias) for antialias in (False, True)]
    figure = plot_position_gradients(pair)
    assert "37.5 % negative" in figure.axes[0].get_title()
    heights = [bar.get_height() for bar in figure.axes[2].patches]
    np.testing.assert_allclose(heights, pair[0].column_sums)
