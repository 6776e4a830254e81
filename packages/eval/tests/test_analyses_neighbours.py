from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity
from vitreg_core import load_model
from vitreg_core.data.images import list_images, read_image
from vitreg_core.outliers import find_outliers, patch_norms
from vitreg_eval.analyses.neighbours import (
    NeighbourSimilarity,
    auroc,
    neighbour_similarity,
    plot_neighbour_similarity,
    similarity_by_kind,
)

STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))


def test_cosines_equal_scikit_learn_and_borders_have_no_neighbour() -> None:
    torch.manual_seed(0)
    rows, cols = 3, 4
    tokens = torch.randn(2, rows * cols, 5)
    ours = neighbour_similarity(tokens, (rows, cols))
    for image in range(2):
        theirs = cosine_similarity(tokens[image].numpy())
        for row in range(rows):
            for col in range(cols):
                for side, (down, right) in enumerate(STEPS):
                    value = float(ours[image, row * cols + col, side])
                    if 0 <= row + down < rows and 0 <= col + right < cols:
                        other = (row + down) * cols + col + right
                        assert value == pytest.approx(theirs[row * cols + col, other], abs=1e-6)
                    else:
                        assert np.isnan(value)


def test_every_directed_pair_counts_once_under_the_kind_of_its_centre() -> None:
    tokens = torch.eye(9)[None] + 1.0
    outliers = torch.zeros(1, 9, dtype=torch.bool)
    outliers[0, [0, 4]] = True  # a corner with two neighbours, the middle with four
    found = similarity_by_kind(neighbour_similarity(tokens, (3, 3)), outliers)
    assert (found.outlier_pairs, found.normal_pairs) == (6, 18)
    assert found.outlier_counts.sum() == 6
    assert found.normal_counts.sum() == 18


def test_planted_similarities_come_back() -> None:
    """A chessboard of outliers along one axis: their neighbours, all normal, lie at a known angle."""
    grid = (4, 6)
    outliers = torch.tensor([(row + col) % 2 == 0 for row in range(4) for col in range(6)])[None]
    tokens = torch.where(outliers[..., None], torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8]))
    similarity = neighbour_similarity(tokens, grid)
    found = similarity_by_kind(similarity, outliers)
    assert found.outlier_median == pytest.approx(0.6)
    assert found.normal_median == pytest.approx(0.6)
    assert found.auroc == 0.5
    where = int(np.flatnonzero(found.outlier_counts)[0])
    assert found.edges[where] - 1e-6 <= 0.6 <= found.edges[where + 1] + 1e-6


def test_auroc_equals_scikit_learn_with_ties() -> None:
    generator = np.random.default_rng(0)
    positive = generator.integers(0, 6, 40) / 10
    negative = generator.integers(2, 9, 300) / 10
    labels = np.r_[np.ones(40), np.zeros(300)]
    assert auroc(positive, negative) == pytest.approx(roc_auc_score(labels, np.r_[positive, negative]), abs=1e-12)
    assert auroc(positive[:0], negative) is None


def test_nothing_is_said_of_a_kind_that_is_not_there() -> None:
    similarity = neighbour_similarity(torch.randn(1, 6, 3), (2, 3))
    found = similarity_by_kind(similarity, torch.zeros(1, 6, dtype=torch.bool))
    assert (found.outlier_median, found.auroc, found.outlier_pairs) == (None, None, 0)
    assert found.normal_median == pytest.approx(float(similarity[~similarity.isnan()].quantile(0.5)))
    assert isinstance(found, NeighbourSimilarity)
    figure = plot_neighbour_similarity({"input": found})
    assert [line.get_label() for line in figure.axes[0].lines] == [f"normal, median {found.normal_median:.2f}"]


def test_the_drawn_densities_have_area_one() -> None:
    torch.manual_seed(0)
    outliers = torch.rand(4, 36) < 0.2
    found = similarity_by_kind(neighbour_similarity(torch.randn(4, 36, 3), (6, 6)), outliers)
    for line in plot_neighbour_similarity({"output": found}).axes[0].lines:
        assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(1, abs=0.02)


@pytest.mark.real_data
def test_outliers_of_a_real_model_are_more_alike_at_the_input_and_less_at_the_output(shared_data: Path) -> None:
    model = load_model(str(shared_data / "weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k")).eval()
    files = list_images(shared_data / "imagenet-sample" / "val")[::60]
    images = torch.stack([model.preprocess(read_image(file)) for file in files])
    with torch.no_grad():
        embeddings, features = model.embeddings(images), model.features(images)
    outliers = find_outliers(patch_norms(model, images)[-1]).mask
    first, last = (
        similarity_by_kind(neighbour_similarity(tokens, features.grid), outliers)
        for tokens in (embeddings, features.patches)
    )
    assert first.auroc is not None
    assert last.auroc is not None
    assert first.auroc > 0.52
    assert last.auroc < 0.1
