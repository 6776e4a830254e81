import math

import numpy as np
import pytest
import torch
from scipy.ndimage import center_of_mass
from scipy.stats import entropy
from vitreg_core.errors import InputError
from vitreg_eval.analyses.focus import focus_sums, plot_focus, positional_focus


def test_an_even_map_has_entropy_log_p_and_lies_in_the_middle() -> None:
    found = positional_focus(focus_sums(torch.full((2, 1, 3, 5), 7.0)), class_token=True)
    assert found.entropy.item() == pytest.approx(math.log(15))
    assert found.relative_entropy.item() == pytest.approx(1)
    np.testing.assert_allclose(found.centre, [[0.5, 0.5]])
    np.testing.assert_allclose(found.rings, [[1, 1]])
    np.testing.assert_allclose(found.maps, np.full((1, 3, 5), 1 / 15))


def test_a_single_patch_has_no_entropy() -> None:
    maps = torch.zeros(1, 2, 4, 8)
    maps[0, 0, 0, 7] = maps[0, 1, 1, 2] = 0.3
    found = positional_focus(focus_sums(maps), class_token=False)
    np.testing.assert_array_equal(found.entropy, [0, 0])
    np.testing.assert_allclose(found.centre, [[0.125, 15 / 16], [0.375, 5 / 16]])
    np.testing.assert_allclose(found.rings, [[32 / 20, 0], [0, 32 / 12]])  # 20 patches at the border, 12 within
    assert found.names == ("register 0", "register 1")


def test_numbers_equal_scipy_on_the_mean_of_renormalised_maps() -> None:
    torch.manual_seed(0)
    maps = torch.rand(6, 3, 4, 5) * torch.rand(6, 3, 1, 1)
    found = positional_focus(focus_sums(maps[:4]) + focus_sums(maps[4:]), class_token=True)
    alone = maps.double().numpy()
    alone /= alone.sum(axis=(2, 3), keepdims=True)
    mean = alone.mean(axis=0)
    np.testing.assert_allclose(found.maps, mean)
    np.testing.assert_allclose(found.entropy, entropy(mean.reshape(3, -1), axis=1))
    np.testing.assert_allclose(found.image_entropy, entropy(alone.reshape(6, 3, -1), axis=2).mean(axis=0))
    centres = np.array([center_of_mass(one) for one in mean])
    np.testing.assert_allclose(found.centre, (centres + 0.5) / [4, 5])
    assert found.images == 6


def test_looking_at_another_patch_in_every_image_is_broad_on_average_only() -> None:
    found = positional_focus(focus_sums(torch.eye(9).reshape(9, 1, 3, 3)), class_token=True)
    assert found.relative_entropy.item() == pytest.approx(1)
    assert found.image_entropy.item() == 0


def test_images_of_other_sizes_are_refused() -> None:
    with pytest.raises(InputError, match=r"total of shapes \(1, 3, 3\) and \(1, 3, 1\) .*; give images of one size"):
        _ = focus_sums(torch.rand(2, 1, 3, 3)) + focus_sums(torch.rand(2, 1, 3, 1))


def test_a_single_patch_is_even() -> None:
    found = positional_focus(focus_sums(torch.ones(1, 1, 1, 1)), class_token=True)
    assert found.relative_entropy.item() == 1


def test_plot_shows_every_token_of_every_model() -> None:
    two = positional_focus(focus_sums(torch.rand(2, 2, 4, 5)), class_token=True)
    one = positional_focus(focus_sums(torch.rand(2, 1, 3, 3)), class_token=True)
    figure = plot_focus({"with": two, "without": one})
    assert len(figure.axes) == 6
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), two.maps[1].numpy())
    assert not figure.axes[4].images
    assert len(figure.axes[2].lines) == 3  # two profiles and the even one
