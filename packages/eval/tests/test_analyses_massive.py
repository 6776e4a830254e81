import numpy as np
import pytest
import torch
from vitreg_core.errors import InputError
from vitreg_eval.analyses.massive import MassiveActivations, plot_massive_activations


def test_top_and_median_equal_numpy() -> None:
    torch.manual_seed(0)
    blocks = [torch.randn(5, 3, 7), torch.randn(5, 3, 7) * 4]  # 21 values, so that the median is one of them
    found = MassiveActivations(2, 7)
    for part in (slice(0, 2), slice(2, 5)):
        found.add([block[part] for block in blocks], ["cls"])
    for block, result in zip(blocks, found.result(), strict=True):
        values = np.sort(np.abs(block.numpy().reshape(5, -1)), axis=1)
        np.testing.assert_allclose(result.top, values[:, ::-1][:, :3].mean(axis=0), rtol=1e-6)
        assert result.median == pytest.approx(np.median(values, axis=1).mean(), rel=1e-6)
        assert result.largest == pytest.approx(values.max(), rel=1e-6)
        assert (result.images, result.massive_images) == (5, 0)
    assert [result.block for result in found.result()] == [0, 1]


def test_planted_activations_come_back_with_dimension_and_holder() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 8, 6, generator=generator)  # cls, two registers, five patches
    tokens[0, 0, 2] = -300
    tokens[1, 1, 2] = 2000
    tokens[2, 4, 5] = 3000
    tokens[3, 7, 2] = -5000
    outliers = torch.zeros(4, 5, dtype=torch.bool)
    outliers[3, 4] = True
    found = MassiveActivations(1, 6)
    found.add([tokens], ["cls", "register", "register"], outliers)
    (result,) = found.result()
    assert [(one.dimension, one.share) for one in result.dimensions] == [(2, 0.75), (5, 0.25)]
    holders = result.holders
    assert (holders.cls, holders.register, holders.patch, holders.outlier) == (0.25, 0.25, 0.25, 0.25)
    ratios = [float(image.abs().max() / image.abs().flatten().quantile(0.5)) for image in tokens]
    assert result.massive_images == np.mean([ratio > 1000 for ratio in ratios])
    assert 0 < result.massive_images < 1
    assert result.largest == 5000


def test_a_thousand_times_a_tiny_median_is_not_massive_below_100() -> None:
    tokens = torch.full((1, 3, 3), 1e-3)
    tokens[0, 1, 1] = 99
    found = MassiveActivations(1, 3)
    found.add([tokens], [])
    assert found.result()[0].massive_images == 0
    assert found.result()[0].holders.patch == 1


def test_memory_does_not_grow_with_the_images() -> None:
    found = MassiveActivations(2, 8)

    def held() -> int:
        return sum(value.numel() for value in vars(found).values() if isinstance(value, torch.Tensor))

    before = held()
    for _ in range(5):
        found.add([torch.randn(3, 4, 8)] * 2, [])
    assert held() == before
    assert found.images == 15


def test_nothing_to_say_of_no_images() -> None:
    with pytest.raises(InputError, match="massive activations of 0 images; give at least one"):
        MassiveActivations(2, 4).result()


def test_the_plot_has_a_line_for_each_rank_and_the_median() -> None:
    found = MassiveActivations(3, 4)
    found.add([torch.rand(2, 3, 4) + 0.1 for _ in range(3)], [])
    results = found.result()
    lines = plot_massive_activations(results).axes[0].lines
    assert [line.get_label() for line in lines] == ["top 1", "top 2", "top 3", "median"]
    np.testing.assert_allclose(lines[0].get_ydata(), [one.top[0] for one in results])
