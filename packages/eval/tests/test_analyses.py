import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from vitreg_eval.analyses.attention import peakiness, prefix_maps
from vitreg_eval.analyses.norms import norm_quantiles, worst_images
from vitreg_eval.analyses.pca import pca_maps


def test_prefix_maps_are_head_means_over_patches_that_sum_to_one() -> None:
    attention = torch.rand(2, 3, 8, 8).softmax(dim=-1)
    maps = prefix_maps(attention, 2, (2, 3))
    torch.testing.assert_close(maps.sum(dim=(-2, -1)), torch.ones(2, 2))
    row = attention[1, :, 0, 2:].mean(dim=0)
    torch.testing.assert_close(maps[1, 0, 1, 2], row[5] / row.sum())


def test_peakiness_of_even_and_peaked_maps() -> None:
    even, peaked = torch.full((4, 4), 1 / 16), torch.full((4, 4), 0.01)
    peaked[1, 2] = 0.5
    torch.testing.assert_close(peakiness(torch.stack([even, peaked])), torch.tensor([1.0, 50.0]))


def test_principal_components_equal_scikit_learn() -> None:
    torch.manual_seed(0)
    patches = torch.randn(3, 8, 6) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1])
    maps = pca_maps(patches, (2, 4))
    flat = patches.reshape(-1, 6).double().numpy()
    theirs = PCA(3).fit(flat)
    for index in range(3):
        scores = theirs.transform(flat)[:, index]
        ours = maps.reshape(-1, 3)[:, index].double().numpy()
        inside = (ours > 0) & (ours < 1)
        assert abs(np.corrcoef(scores[inside], ours[inside])[0, 1]) == pytest.approx(1, abs=1e-5)
    assert (maps.min(), maps.max()) == (0, 1)


def test_quantiles_per_block() -> None:
    norms = torch.arange(1, 101).float().reshape(1, 10, 10).repeat(2, 1, 1)
    np.testing.assert_allclose(norm_quantiles(norms)[1], np.percentile(np.arange(1, 101), [50, 90, 98, 99.9, 100]))


def test_images_are_picked_from_most_to_fewest_outliers() -> None:
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[2, :3] = mask[0, :1] = True
    norms = torch.ones(4, 5)
    norms[3, 0] = 2
    assert worst_images(mask, norms, 4) == [2, 0, 3, 1]
    assert worst_images(mask, norms, 2) == [2, 3]
    assert worst_images(mask, norms, 9) == [2, 0, 3, 1]
