import numpy as np
import torch
from torch.nn import functional as F
from vitreg_eval.analyses.facet_norms import facet_norms, head_norms, plot_facet_norms


def test_planted_lengths_come_back_per_head() -> None:
    torch.manual_seed(0)
    outliers = torch.zeros(3, 6, dtype=torch.bool)
    outliers[0, 2] = outliers[2, 5] = True
    vectors = F.normalize(torch.randn(3, 2, 8, 4), dim=-1)  # two prefix tokens, six patches
    lengths = torch.ones(3, 2, 8)
    lengths[:, 1] = 2
    lengths[:, :, :2] = 100
    lengths[0, 0, 4] = lengths[2, 0, 7] = 8
    (found,) = facet_norms({"keys": head_norms(vectors * lengths[..., None], 2)}, outliers)
    assert found.name == "keys"
    np.testing.assert_allclose(found.normal, [1, 2], rtol=1e-6)
    np.testing.assert_allclose(found.outlier, [8, 2], rtol=1e-6)
    np.testing.assert_allclose(found.ratio, [8, 1], rtol=1e-6)


def test_medians_are_over_all_images() -> None:
    norms = torch.rand(4, 3, 5)
    outliers = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    (found,) = facet_norms({"values": norms}, outliers)
    for head in range(3):
        picked = norms[:, head].numpy()
        np.testing.assert_allclose(found.outlier[head], np.median(picked[outliers.numpy()]))
        np.testing.assert_allclose(found.normal[head], np.median(picked[~outliers.numpy()]))


def test_half_precision_does_not_overflow() -> None:
    norms = head_norms(torch.full((1, 1, 2, 64), 30000.0, dtype=torch.float16), 1)
    torch.testing.assert_close(norms, torch.full((1, 1, 1), 240000.0), rtol=1e-2, atol=0)


def test_without_outliers_there_is_no_ratio_and_still_a_plot() -> None:
    (found,) = facet_norms({"queries": torch.rand(2, 3, 4)}, torch.zeros(2, 4, dtype=torch.bool))
    assert np.isnan(found.outlier).all()
    assert np.isnan(found.ratio).all()
    figure = plot_facet_norms([found])
    assert figure.axes[0].get_title() == "queries: no outliers"
    figure.canvas.draw()


def test_the_plot_names_the_ratio() -> None:
    outliers = torch.tensor([[True, False]])
    found = facet_norms({"queries": torch.tensor([[[3.0, 2.0]]]), "keys": torch.tensor([[[1.0, 2.0]]])}, outliers)
    titles = [axes.get_title() for axes in plot_facet_norms(found).axes]
    assert titles == ["queries: outlier / normal 1.50", "keys: outlier / normal 0.50"]
