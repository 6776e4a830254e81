import numpy as np
import pytest
from vitreg_core import ViTConfig
from vitreg_core.errors import InputError
from vitreg_eval.analyses.register_cost import plot_register_cost, register_cost


def test_flops_grow_as_in_the_figure() -> None:
    """Registers paper, figure 12: ViT-L/14 at 224 px."""
    cost = register_cost("vit_l14")
    assert cost.counts.tolist() == [0, 1, 2, 4, 8, 16]
    assert (100 * cost.flops).round(2).tolist() == [0, 0.40, 0.81, 1.62, 3.24, 6.48]
    assert 100 * cost.parameters[-1] == pytest.approx(0.0054, abs=5e-5)


@pytest.mark.parametrize(("preset", "growth"), [("vit_s16_reg4", 2.17), ("vit_b16", 2.10)])
def test_two_per_cent_do_not_hold_for_patches_of_16(preset: str, growth: float) -> None:
    assert (100 * register_cost(preset, [4]).flops).round(2).tolist() == [growth]


def test_parameters_grow_by_a_row_per_register() -> None:
    config = ViTConfig(image_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2)
    cost = register_cost(config, [0, 3])
    width, hidden, patches = 16, 64, 4
    block = 4 * width + 4 * width * width + 4 * width + 2 * width * hidden + hidden + width
    positions = (patches + (config.class_position is True)) * width
    total = 3 * 256 * width + width + width + positions + block + 2 * width
    assert cost.parameters[1] == pytest.approx(3 * width / total, rel=0.05)
    assert cost.flops[0] == cost.parameters[0] == 0


def test_unknown_models_are_refused() -> None:
    with pytest.raises(InputError, match="unknown preset 'vit_q16'"):
        register_cost("vit_q16")


def test_the_plot_is_in_per_cent() -> None:
    config = ViTConfig(image_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2)
    cost = register_cost(config, [0, 4])
    lines = plot_register_cost({"tiny": cost}).axes[0].lines
    assert [line.get_label() for line in lines] == ["FLOPs, tiny", "parameters, tiny"]
    np.testing.assert_allclose(lines[0].get_ydata(), 100 * cost.flops)
