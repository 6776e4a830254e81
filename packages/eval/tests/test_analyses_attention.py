import numpy as np
import torch
from vitreg_core import VisionTransformer, ViTConfig
from vitreg_eval.analyses import attention
from vitreg_eval.analyses.attention import BY_CLASS, BY_PATCHES


def test_a_model_without_class_token_looks_by_its_patches() -> None:
    weights = torch.rand(2, 3, 7, 7).softmax(dim=-1)
    found = attention.looks(weights, ("register",), (2, 3))
    mean = weights.mean(dim=1)[:, 1:, 1:].mean(dim=1)
    torch.testing.assert_close(found.maps.flatten(1), mean / mean.sum(dim=1, keepdim=True))
    assert found.query == BY_PATCHES


def test_looks_are_those_of_the_class_token_of_a_model() -> None:
    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, registers=2)
    model, images = VisionTransformer(config).eval(), torch.randn(2, 3, 32, 40)
    with torch.no_grad():
        weights = model.attention(images, -1)
    found = attention.looks(weights, model.prefix, (4, 5))
    row = weights[:, :, 0, 3:].mean(dim=1)
    torch.testing.assert_close(found.maps.flatten(1), row / row.sum(dim=1, keepdim=True))
    assert found.query == BY_CLASS


def test_share_of_the_top_patches() -> None:
    flat = torch.ones(10, 20) / 200
    assert attention.top_share(flat).item() == torch.tensor(4 / 200)  # 2 % of 200
    peaked = torch.zeros(5, 10)
    peaked[2, 3], peaked[4, 4] = 0.75, 0.25
    assert attention.top_share(peaked).item() == 0.75  # one of 50 patches
    assert attention.top_share(peaked, 0.021).item() == 1.0  # rounded up to two
    found = attention.Looks(torch.stack([peaked, torch.ones(5, 10) / 50]), BY_CLASS)
    torch.testing.assert_close(found.top_share, torch.tensor([0.75, 0.02]))
    assert found.peakiness[1] == 1


def test_a_map_without_mass_stays_zero() -> None:
    weights = torch.eye(5).expand(1, 1, 5, 5)
    assert torch.equal(attention.prefix_maps(weights, 1, (2, 2)), torch.zeros(1, 1, 2, 2))


def test_images_are_picked_by_their_rank() -> None:
    assert attention.pick_images(torch.tensor([5.0, 1, 9, 3, 7])) == (1, 0, 2)
    assert attention.pick_images(torch.tensor([2.0, 2, 2])) == (0, 1, 0)
    assert attention.pick_images(torch.tensor([4.0])) == (0, 0, 0)


def test_maps_of_a_row_share_one_colour_range() -> None:
    first, second = torch.rand(2, 3, 4), torch.rand(2, 6, 8)
    images = [np.random.default_rng(0).random((6, 8, 3))] * 2
    figure = attention.plot_attention(images, {"without": first, "with": second})
    assert len(figure.axes) == 6
    for row in range(2):
        ranges = [axes.images[0].get_clim() for axes in figure.axes[3 * row + 1 : 3 * row + 3]]
        assert ranges[0] == ranges[1] == (0, max(float(first[row].max()), float(second[row].max())))
    np.testing.assert_array_equal(figure.axes[4].images[0].get_array(), first[1].numpy())
