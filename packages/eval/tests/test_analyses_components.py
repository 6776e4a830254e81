from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from scipy.stats import median_abs_deviation
from sklearn.decomposition import PCA
from vitreg_core.errors import InputError
from vitreg_eval.analyses.components import component_maps, first_component, patch_scatter, plot_components


@pytest.fixture
def patches() -> torch.Tensor:
    """Of 12 images, with a mean far from zero."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([5.0, 3, 2, 1, 0.5])
    return torch.randn(12, 6, 5, generator=generator) * scale @ torch.randn(5, 5, generator=generator) + 1000


def test_component_of_many_batches_is_that_of_scikit_learn(patches: torch.Tensor) -> None:
    found = first_component(reduce(add, (patch_scatter(batch) for batch in patches.split([5, 1, 6]))))
    flat = patches.reshape(-1, 5).double().numpy()
    theirs = PCA(1).fit(flat)
    direction = theirs.components_[0] * np.sign(theirs.components_[0][np.abs(theirs.components_[0]).argmax()])
    np.testing.assert_allclose(found.direction, direction, atol=1e-9)
    np.testing.assert_allclose(found.mean, theirs.mean_)
    assert found.explained == pytest.approx(theirs.explained_variance_ratio_[0])


def test_maps_are_in_robust_deviations_of_the_normal_patches(patches: torch.Tensor) -> None:
    component = first_component(patch_scatter(patches))
    normal = torch.ones(12, 6, dtype=torch.bool)
    normal[:, 2] = normal[0, 0] = False  # 59 are left: their median is one of them
    found = component_maps(component, patches, (2, 3), normal)
    flat = patches.reshape(-1, 5).double().numpy()
    theirs = PCA(1).fit(flat)
    along = theirs.transform(flat)[:, 0] * np.sign(theirs.components_[0] @ component.direction.numpy())
    bulk = along[normal.flatten().numpy()]
    expected = (along - np.median(bulk)) / median_abs_deviation(bulk, scale="normal")
    np.testing.assert_allclose(found.maps.flatten(), expected, rtol=1e-6, atol=1e-6)
    assert (found.middle, found.deviation) == pytest.approx(
        (np.median(bulk), median_abs_deviation(bulk, scale="normal"))
    )


def test_outliers_stand_out_and_do_not_widen_the_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(20, 100, 8, generator=generator)
    patches[:, 7, 3] += 500
    component = first_component(patch_scatter(patches))
    found = component_maps(component, patches, (10, 10))
    assert component.direction.argmax() == 3
    assert found.deviation == pytest.approx(1, abs=0.1)
    assert found.maps[:, 0, 7].min() > 30
    others = found.maps.flatten(1)[:, torch.arange(100) != 7]
    assert others.std().item() == pytest.approx(1, abs=0.1)
    assert others.median().item() == pytest.approx(0, abs=0.01)


def test_tokens_without_a_direction_are_refused() -> None:
    for value in (1.0, float("nan")):
        with pytest.raises(InputError, match="6 tokens that are all the same or not finite"):
            first_component(patch_scatter(torch.full((2, 3, 4), value)))


def test_plot_shows_both_ranges_of_every_model(patches: torch.Tensor) -> None:
    found = component_maps(first_component(patch_scatter(patches)), patches[:2], (2, 3))
    figure = plot_components([np.zeros((4, 6, 3))] * 2, {"without": found, "with": found})
    assert len(figure.axes) == 10
    assert [axes.images[0].get_clim() for axes in figure.axes[6:]] == [(-3, 3), (-3, 3), (-30, 30), (-30, 30)]
    np.testing.assert_array_equal(figure.axes[6].images[0].get_array(), found.maps[1].numpy())
