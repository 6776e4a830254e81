import math
from pathlib import Path

import pytest
import timm
import torch
from vitreg_core import Backbone, VisionTransformer, ViTConfig, create_model, load_model, model_cost, save_model
from vitreg_core.capturing import capture
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.elastic import AutoRegisters, calibrate, outlier_scores
from vitreg_core.errors import InputError
from vitreg_core.outliers import find_outliers, patch_norms
from vitreg_core.planted import plant_register_neurons
from vitreg_core.test_time import Neuron, with_test_time_registers

CONFIG = ViTConfig(
    image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, registers=3, layer_scale=0.5, num_classes=5
)


def model(**changes: object) -> VisionTransformer:
    built = VisionTransformer(CONFIG.model_copy(update=changes)).eval()
    torch.nn.init.normal_(built.registers.tokens)
    return built


def rebuilt(whole: VisionTransformer, count: int) -> VisionTransformer:
    """A model of its own with the first registers of another."""
    alone = VisionTransformer(whole.config.model_copy(update={"registers": count})).eval()
    tensors = whole.state_dict()
    alone.load_state_dict({**tensors, "registers.tokens": tensors["registers.tokens"][:count]})
    return alone


def everything(one: VisionTransformer, images: torch.Tensor) -> list[torch.Tensor]:
    """All that a model can be asked."""
    inside = one.qkv(images, 1)
    outputs = [one(images).tokens, one.classify(images), one.attention(images, -1), one.hidden(images, 1)]
    outputs += [part.tokens for part in one.intermediate(images, [0, 2], norm=False)]
    outputs += [one.packed([images, images[:1]])[1].tokens, one.forward_features(images), inside.queries, inside.values]
    return [*outputs, *one.get_intermediate_layers(images, 2, reshape=True), one.embeddings(images)]


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("count", [0, 1, 3])
@torch.no_grad()
def test_first_registers_equal_a_model_that_has_no_others(count: int, position: str) -> None:
    whole, images = model(position=position), torch.randn(2, 3, 32, 40)
    view, alone = whole.with_registers(count), rebuilt(whole, count)
    assert isinstance(view, Backbone)
    assert (view.num_registers, view.num_prefix_tokens, view.prefix) == (count, 1 + count, alone.prefix)
    for ours, expected in zip(everything(view, images), everything(alone, images), strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(whole(images, registers=count).tokens, alone(images).tokens)


@torch.no_grad()
def test_first_registers_equal_timm() -> None:
    whole, images = model(), torch.randn(2, 3, 32, 32)
    view = whole.with_registers(2)
    theirs = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=5,
        reg_tokens=2,
        no_embed_class=True,
        init_values=0.5,
    ).eval()
    names = {"cls_token": "cls", "reg_token": "registers.tokens", "pos_embed": "positions.patches"}
    ours = view.state_dict()
    theirs.load_state_dict({name: ours[names.get(name, name)].view(t.shape) for name, t in theirs.state_dict().items()})
    torch.testing.assert_close(view.classify(images), theirs(images), rtol=0, atol=1e-6)


@torch.no_grad()
def test_all_registers_change_nothing() -> None:
    whole, images = model(), torch.randn(2, 3, 32, 32)
    for view, plain in zip(everything(whole.with_registers(3), images), everything(whole, images), strict=True):
        assert torch.equal(view, plain)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_gradients_reach_exactly_the_registers_in_use(count: int) -> None:
    whole = model()
    whole(torch.randn(2, 3, 32, 32), registers=count).patches.square().sum().backward()
    gradient = whole.registers.tokens.grad
    assert gradient is not None
    assert [bool(row.abs().sum() > 0) for row in gradient] == [index < count for index in range(3)]


def test_weights_are_shared_and_hooks_run_once() -> None:
    whole, images, calls = model(), torch.randn(1, 3, 32, 32), []
    view = whole.with_registers(1)
    before = view(images).patches
    with torch.no_grad():
        whole.blocks[0].mlp.fc1.weight.mul_(2.0)
        whole.registers.tokens.mul_(3.0)
    assert not torch.allclose(view(images).patches, before)
    assert torch.equal(view(images).patches, whole(images, registers=1).patches)
    assert {id(p) for p in view.parameters()} == {id(p) for p in whole.parameters()}
    whole.register_forward_hook(lambda *_: calls.append(1))
    whole(images, registers=1)
    assert calls == [1]
    assert view.double().registers.tokens.dtype == whole.registers.tokens.dtype == torch.float64


@torch.no_grad()
def test_a_saved_view_is_a_model_with_so_many_registers(tmp_path: Path) -> None:
    whole, images = model(), torch.randn(1, 3, 32, 32)
    for layout in ("vitreg", "timm"):
        save_model(whole.with_registers(2), tmp_path / layout, layout=layout)
        loaded = load_model(tmp_path / layout)
        assert loaded.num_registers == 2
        torch.testing.assert_close(loaded(images).tokens, whole(images, registers=2).tokens)


@torch.no_grad()
def test_tools_work_on_a_view() -> None:
    whole, images = model(), torch.randn(1, 3, 32, 32)
    view = whole.with_registers(1)
    with capture(view, 2, "attention") as taken:
        view(images)
    torch.testing.assert_close(taken.attention[2], view.attention(images, 2))
    assert view.with_registers(0).num_registers == 0
    edited = with_test_time_registers(view, [Neuron(1, 5)])
    assert edited(images).registers.shape == (1, 2, 24)
    with pytest.raises(InputError, match="moved neurons, which need its last register; take registers away before"):
        edited.with_registers(1)


@pytest.mark.parametrize("count", [-1, 4])
def test_registers_that_are_not_there_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"{count} registers of a model with 3; use 0 to 3"):
        model()(torch.randn(1, 3, 32, 32), registers=count)


@torch.no_grad()
def planted() -> tuple[VisionTransformer, torch.Tensor]:
    """A model with registers whose patches hold outliers in some of the images, and the images."""
    clean = create_model("vit_ti8", image_size=64, depth=3, embed_dim=96, layer_scale=0.1, registers=2, num_classes=4)
    clean.positions.patches.mul_(20)
    images = clean.preprocess.normalize(draw_scenes(96, seed=1).image)
    return plant_register_neurons(clean.eval(), images, layer=1, share=0.002)[0], images


@torch.no_grad()
def test_calibration_finds_the_images_that_the_rule_finds() -> None:
    whole, images = planted()
    without = whole.with_registers(0)
    found = find_outliers(patch_norms(without, images)[-1])
    cutoff = calibrate(whole, images.split(40))
    chosen = outlier_scores(without.intermediate(images, [-1], norm=False)[0].patches) > cutoff
    assert 0 < chosen.sum() < len(images)
    assert torch.equal(chosen, found.mask.any(dim=1))


@torch.no_grad()
def test_each_image_takes_the_registers_that_its_score_asks_for() -> None:
    whole, images = planted()
    cutoff = calibrate(whole, [images])
    auto, without = AutoRegisters(whole, cutoff), whole.with_registers(0)
    chosen = outlier_scores(without.intermediate(images, [-1], norm=False)[0].patches) > cutoff
    for ask in ("features", "classify", "forward_features"):
        ours, few, all_of_them = (getattr(one, ask)(images) for one in (auto, without, whole))
        if ask == "features":
            assert ours.registers.shape[1] == 0
            ours, few, all_of_them = ours.patches, few.patches, all_of_them.patches
        if ask == "forward_features":
            all_of_them = all_of_them[:, [0, *range(3, all_of_them.shape[1])]]
        torch.testing.assert_close(ours[chosen], all_of_them[chosen])
        torch.testing.assert_close(ours[~chosen], few[~chosen])
    first, _ = auto.intermediate(images, [0, -1], norm=False)
    torch.testing.assert_close(first.patches[chosen], whole.intermediate(images, [0], norm=False)[0].patches[chosen])
    assert isinstance(auto, Backbone)


@torch.no_grad()
def test_cost_counts_the_images_run_twice() -> None:
    whole, images = planted()
    scores = outlier_scores(whole.with_registers(0).intermediate(images, [-1], norm=False)[0].patches)
    auto = AutoRegisters(whole, float(scores.sort().values[71]))
    for part in images.split(32):
        auto(part)
    few, many = (model_cost(whole.config.model_copy(update={"registers": count})).flops for count in (0, 2))
    cost = auto.cost()
    assert (cost.images, cost.share) == (96, 0.25)
    assert cost.flops == few + many / 4
    assert cost.relative == cost.flops / many > 1


@torch.no_grad()
def test_without_outliers_no_image_needs_registers() -> None:
    whole, images = model(), torch.randn(32, 3, 96, 96)
    assert calibrate(whole, [images]) == math.inf
    auto = AutoRegisters(whole, math.inf)
    assert torch.equal(auto(images).tokens, whole(images, registers=0).tokens)
    assert auto.cost(96).share == 0
    assert auto.cost(96).relative < 1


def test_what_one_pass_cannot_tell_is_refused() -> None:
    auto, images = AutoRegisters(model(), 2.0), torch.randn(1, 3, 32, 32)
    for ask in (
        lambda: auto.attention(images, -1),
        lambda: auto.qkv(images, 0),
        lambda: auto.hidden(images, 0),
        lambda: auto.packed([images]),
    ):
        with pytest.raises(InputError, match=r"fix the number by model.with_registers\(count\)"):
            ask()
    with pytest.raises(InputError, match="no images were run yet, and cost is counted over them; call the model first"):
        auto.cost()
    with pytest.raises(InputError, match="give at least one image"):
        calibrate(model(), [])
