import pytest
import torch
from einops import rearrange
from vitreg_core import VisionTransformer, ViTConfig, create_model
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError
from vitreg_core.outliers import emergence_block, find_outliers, patch_norms
from vitreg_core.planted import plant_register_neurons
from vitreg_core.test_time import Neuron, add_test_time_register

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, registers=1, layer_scale=0.5)
NEURONS = [Neuron(1, 5), Neuron(1, 9), Neuron(2, 0)]


def model() -> VisionTransformer:
    return VisionTransformer(CONFIG).eval()


@torch.no_grad()
def scene_model(depth: int) -> VisionTransformer:
    """A random model whose patch norms are even, as those of trained models are."""
    clean = create_model("vit_ti8", image_size=64, depth=depth, embed_dim=96, layer_scale=0.1).eval()
    clean.positions.patches.mul_(20)
    return clean


@torch.no_grad()
def test_each_moved_neuron_is_its_maximum_at_the_new_token_and_nothing_elsewhere() -> None:
    before, images = model(), torch.randn(3, 3, 32, 32)
    after = add_test_time_register(before, NEURONS)
    mlp = after.block(1).mlp
    tokens = after.block(1).norm2(after.block(1).after_attention(after.stream(images, 1)))
    plain, moved = mlp.mlp.hidden(tokens), mlp.hidden(tokens)  # type: ignore[operator, union-attr]
    for unit in range(plain.shape[-1]):
        if unit in (5, 9):
            expected = torch.zeros(3, tokens.shape[1])
            expected[:, 2] = plain[:, :, unit].max(dim=1).values
            torch.testing.assert_close(moved[:, :, unit], expected)
        else:
            torch.testing.assert_close(moved[:, :, unit], plain[:, :, unit])


@torch.no_grad()
def test_the_new_register_stands_after_the_others_and_images_do_not_mix() -> None:
    after, images = add_test_time_register(model(), NEURONS), torch.randn(3, 3, 32, 32)
    together = after(images)
    assert together.registers.shape == (3, 2, 24)
    torch.testing.assert_close(after.embed(images)[:, 2], torch.zeros(3, 24))
    torch.testing.assert_close(after(images[1:2]).patches, together.patches[1:2])


def test_the_original_is_left_alone() -> None:
    before = model()
    state = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    add_test_time_register(before, NEURONS)
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.state_dict().items())
    assert before.num_registers == 1


@pytest.mark.parametrize(
    ("neurons", "advice"),
    [
        ([], "0 neurons given; name at least one"),
        ([Neuron(1, 96)], "unit 96 of block 1, which has 96; use 0 to 95"),
        ([Neuron(3, 0)], "layer 3 of a model with 3 blocks"),
    ],
)
def test_neurons_that_are_not_there_are_refused(neurons: list[Neuron], advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        add_test_time_register(model(), neurons)


def test_moving_twice_is_refused() -> None:
    once = add_test_time_register(model(), NEURONS)
    with pytest.raises(InputError, match="give all neurons to the original model at once"):
        add_test_time_register(once, [Neuron(0, 1)])


@torch.no_grad()
def test_a_planted_artifact_is_found_where_it_was_planted_and_removed() -> None:
    clean = scene_model(depth=6)
    fit, fresh = (clean.preprocess.normalize(draw_scenes(96, seed=seed).image) for seed in (1, 2))
    planted, neurons = plant_register_neurons(clean, fit, layer=3)
    mended = add_test_time_register(planted, neurons)
    blocks = [find_outliers(block) for block in patch_norms(planted, fresh)]
    assert [block.found for block in blocks] == [False] * 3 + [True] * 3
    assert emergence_block([block.found for block in blocks]) == 3
    assert 0.01 < blocks[-1].fraction < 0.06
    assert blocks[-1].max_norm > 8 * blocks[-1].median_norm
    assert not any(find_outliers(block).found for block in patch_norms(clean, fresh))
    cutoff = blocks[-1].cutoff
    assert cutoff is not None
    assert patch_norms(mended, fresh)[-1].max() < cutoff
    hit = blocks[-1].mask.any(dim=1)
    assert mended.intermediate(fresh, [-1], norm=False)[0].registers[hit].norm(dim=-1).median() > cutoff


@torch.no_grad()
def test_planted_outliers_sit_in_the_background() -> None:
    scenes, clean = draw_scenes(96, seed=3), scene_model(depth=4)
    images = clean.preprocess.normalize(scenes.image)
    planted, _ = plant_register_neurons(clean, images, layer=2)
    found = find_outliers(patch_norms(planted, images)[-1])
    background = (
        rearrange(scenes.mask == 0, "b (rows y) (cols x) -> b (rows cols) (y x)", y=8, x=8).float().mean(dim=-1)
    )
    assert background.mean() < 0.8
    assert background[found.mask].mean() > 0.95


def test_planting_needs_a_plain_mlp() -> None:
    gated = VisionTransformer(CONFIG.model_copy(update={"feed_forward": "swiglu"}))
    with pytest.raises(InputError, match="has a SwiGLU; plant in a model with plain MLPs"):
        plant_register_neurons(gated, torch.randn(4, 3, 32, 32), layer=0)
