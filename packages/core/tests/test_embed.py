import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from vitreg_core import ViTConfig
from vitreg_core.embed import PatchEmbed, resize_positions
from vitreg_core.errors import InputError


def test_native_positions_are_returned_as_they_are() -> None:
    table = torch.randn(12, 5)
    assert resize_positions(table, (3, 4), (3, 4), antialias=True, offset=0.1) is table


@pytest.mark.parametrize("grid", [(7, 7), (20, 11), (14, 9)])
@pytest.mark.parametrize("antialias", [True, False])
def test_size_mode_equals_timm(grid: tuple[int, int], *, antialias: bool) -> None:
    table = torch.randn(14 * 14, 6)
    theirs = resample_abs_pos_embed(table[None], list(grid), num_prefix_tokens=0, antialias=antialias)[0]
    torch.testing.assert_close(
        resize_positions(table, (14, 14), grid, antialias=antialias, offset=0.0), theirs, rtol=0, atol=0
    )


GOLDEN = {  # column sums of the gradient, 16x16 to 7x7: reference/registers_analysis.md, P-Fig 11
    (False, 0.0): [2.385, 5.365, -0.349, 6.923, -1.018, 6.363, 0.865, 3.967],
    (True, 0.0): [2.528, 3.443, 3.288, 3.027, 3.030, 3.063, 3.064, 3.056],
    (False, 0.1): [2.509, 5.195, -0.006, 6.789, -1.014, 6.739, 0.106, 5.064],
}


@pytest.mark.parametrize(("antialias", "offset"), GOLDEN)
def test_gradient_through_the_resize_equals_the_golden_values(*, antialias: bool, offset: float) -> None:
    table = torch.zeros(256, 1, requires_grad=True)
    resize_positions(table, (16, 16), (7, 7), antialias=antialias, offset=offset).sum().backward()
    assert table.grad is not None
    columns = table.grad.reshape(16, 16).sum(dim=0)
    torch.testing.assert_close(columns[:8], torch.tensor(GOLDEN[antialias, offset]), rtol=0, atol=6e-4)


def test_patches_are_read_row_by_row_and_trailing_pixels_dropped() -> None:
    embed = PatchEmbed(ViTConfig(patch_size=4, embed_dim=8))
    images = torch.randn(2, 3, 11, 14)
    weight, bias = embed.proj.weight.flatten(1), embed.proj.bias
    second_row_first_patch = images[:, :, 4:8, 0:4].flatten(1) @ weight.T + bias
    torch.testing.assert_close(embed(images)[:, 3], second_row_first_patch)
    assert embed.grid(images) == (2, 3)


def test_an_image_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(InputError, match="image of 3x20 pixels is smaller than one patch of 4; give larger images"):
        PatchEmbed(ViTConfig(patch_size=4, embed_dim=8)).grid(torch.zeros(1, 3, 3, 20))
