import numpy as np
import pytest
import torch
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_eval.analyses.filmstrip import filmstrip, plot_filmstrip


def peaked(heights: list[list[float]]) -> Tensor:
    """Even maps of a class token and one register; the class token's has one peak for each snapshot and image."""
    maps = torch.ones(len(heights), len(heights[0]), 2, 3, 4)
    maps[:, :, 0, 1, 2] = torch.tensor(heights)
    return maps


def test_images_are_chosen_by_their_drop_from_first_to_last_snapshot() -> None:
    maps = peaked([[9, 20, 5, 8], [1, 99, 1, 1], [8, 2, 6, 8]])  # drops 1, 18, -1, 0
    found = filmstrip(maps, class_token=True)
    assert (found.removed, found.persistent) == (1, 2)
    np.testing.assert_allclose(found.peakiness, [[9, 20, 5, 8], [1, 99, 1, 1], [8, 2, 6, 8]])
    assert found.names == ("cls", "register 0")


def test_a_peak_on_nothing_at_both_ends_is_no_change() -> None:
    maps = peaked([[5, 3, 4], [4, 4, 2]])
    maps[:, 1, 0] = 0
    maps[:, 1, 0, 0, 0] = 1
    found = filmstrip(maps, class_token=True)
    assert found.peakiness[0, 1] == torch.inf
    assert (found.removed, found.persistent) == (2, 1)


def test_one_snapshot_is_refused() -> None:
    with pytest.raises(InputError, match="1 snapshot shows no change; give two or more checkpoints"):
        filmstrip(peaked([[1.0]]), class_token=True)


def test_plot_shows_the_maps_of_the_chosen_images() -> None:
    maps = peaked([[9, 20, 5], [8, 2, 6]])
    found = filmstrip(maps, class_token=True)
    figure = plot_filmstrip(found, maps, [np.zeros((3, 4, 3)), np.ones((3, 4, 3))], ["step 0", "step 1"])
    assert len(figure.axes) == 12
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), maps[0, 1, 0].numpy())
    np.testing.assert_array_equal(figure.axes[8].images[0].get_array(), maps[1, 2, 0].numpy())
    assert figure.axes[1].get_title() == "step 0\nmax/median 20.0"
    assert figure.axes[1].images[0].get_clim() == figure.axes[2].images[0].get_clim() == (0, 20)
