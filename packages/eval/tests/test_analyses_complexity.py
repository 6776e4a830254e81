from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from vitreg_core.errors import InputError
from vitreg_eval.analyses.complexity import (
    Complexity,
    artifact_scores,
    picture_complexity,
    plot_complexity,
    relate_to_complexity,
)


def test_busy_pictures_score_higher_than_plain_ones() -> None:
    plain = np.full((32, 48, 3), 120, dtype=np.uint8)
    busy = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    low, high = picture_complexity(plain), picture_complexity(busy)
    assert low.edge_density == 0
    assert high.edge_density > 0.6
    assert high.png_bits >= 24  # noise does not compress
    assert low.png_bits < 2
    assert high.jpeg_bits > 2 * low.jpeg_bits


def test_one_straight_edge_covers_two_columns() -> None:
    picture = np.zeros((10, 20, 3), dtype=np.uint8)
    picture[:, 10:] = 255
    assert picture_complexity(picture).edge_density == pytest.approx(2 / 20)
    faint = np.zeros((10, 20, 3), dtype=np.uint8)
    faint[:, 10:] = 40  # half of 0.16 per pixel on both sides
    assert picture_complexity(faint).edge_density == 0


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=75)
    found = picture_complexity(picture)
    assert found.png_bits == (tmp_path / "a.png").stat().st_size * 8 / 256
    assert found.jpeg_bits == (tmp_path / "a.jpg").stat().st_size * 8 / 256


def test_scores_of_an_image() -> None:
    norms = torch.tensor([[1.0, 2, 3, 30], [2, 2, 2, 2]])
    scores = artifact_scores(norms, norms > 10)
    assert scores.outliers.tolist() == [1, 0]
    assert scores.max_over_median.tolist() == [12, 1]


def test_rank_correlation_equals_scipy_with_ties() -> None:
    generator = np.random.default_rng(0)
    pictures = [Complexity(*row) for row in generator.integers(0, 8, (60, 3)) / 8]
    scores = torch.tensor([4 * one.jpeg_bits for one in pictures]) + torch.from_numpy(generator.integers(0, 4, 60))
    found = {one.measure: one for one in relate_to_complexity(scores, pictures)}
    assert list(found) == ["edge_density", "png_bits", "jpeg_bits"]
    for name, one in found.items():
        theirs = spearmanr(scores.numpy(), [getattr(picture, name) for picture in pictures]).statistic
        assert one.spearman is not None
        assert one.spearman.ci95 is not None
        assert one.spearman.value == pytest.approx(theirs, abs=1e-12)
        assert one.spearman.ci95[0] < theirs < one.spearman.ci95[1]
    strong, none = found["jpeg_bits"].spearman, found["png_bits"].spearman
    assert strong is not None
    assert none is not None
    assert strong.ci95 is not None
    assert none.ci95 is not None
    assert strong.ci95[0] > 0.5
    assert none.ci95[0] < 0 < none.ci95[1]


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """A normal pair of correlation .6 has Spearman's 6/pi asin(.3) = .582."""
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(25):
        first, noise = generator.standard_normal((2, 80))
        second = 0.6 * first + 0.8 * noise
        pictures = [Complexity(value, value, value) for value in second.tolist()]
        interval = relate_to_complexity(torch.from_numpy(first), pictures, seed=seed)[0].spearman
        assert interval is not None
        assert interval.ci95 is not None
        hits += interval.ci95[0] < 6 / np.pi * np.arcsin(0.3) < interval.ci95[1]
    assert hits >= 21


def test_constant_scores_have_no_correlation() -> None:
    pictures = [Complexity(0.1 * index, 1.0, 2.0 * index) for index in range(5)]
    assert all(one.spearman is None for one in relate_to_complexity(torch.zeros(5), pictures))
    found = relate_to_complexity(torch.arange(5.0), pictures)
    assert [one.spearman is None for one in found] == [False, True, False]
    titles = [axes.get_title() for axes in plot_complexity(found, "outliers per image").axes]
    assert titles[0] == "Spearman 1.00 (1.00 to 1.00)"
    assert titles[1] == "no rank correlation: constant"
    with pytest.raises(InputError, match="4 scores and 5 pictures"):
        relate_to_complexity(torch.zeros(4), pictures)
