import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy.spatial.distance import cosine
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from vitreg_core import VisionTransformer, ViTConfig, load_model
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_recipes import find
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data import Batch
from vitreg_recipes.loop import train
from vitreg_recipes.objectives import Objective
from vitreg_recipes.objectives.classify import Classifier, Classify
from vitreg_recipes.objectives.elastic import (
    Elastic,
    ElasticClassifier,
    draw,
    likeness,
    make_network,
    make_objective,
    register_maps,
)
from vitreg_recipes.state import TrainState

if TYPE_CHECKING:
    from conftest import Tiny

Penalty = Literal["correlation", "orthogonality"]
SHAPES = ViTConfig(
    image_size=16, patch_size=4, embed_dim=8, num_heads=2, depth=2, registers=3, num_classes=5, layer_scale=1.0
)


def model(**changes: object) -> VisionTransformer:
    """A tiny model whose registers look at different places."""
    built = VisionTransformer(SHAPES.model_copy(update=changes))
    torch.nn.init.normal_(built.registers.tokens)
    with torch.no_grad():
        for block in (built.block(layer) for layer in range(2)):
            block.attn.qkv.weight.mul_(20)
    return built


def objective(**changes: object) -> tuple[VisionTransformer, Classify]:
    """A tiny model and the signal on it, without mixing."""
    fields = {"mix.mixup": 0.0, "mix.cutmix": 0.0} | {name.replace("__", "."): v for name, v in changes.items()}
    config = override(find("deit3_scenes"), fields)
    config = config.model_copy(update={"model": SHAPES})
    accelerator, built = Accelerator(cpu=True), model()
    return built, make_objective(accelerator.prepare(make_network(built, config.elastic)), accelerator, 5, config)


def batch() -> Batch:
    return Batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 2]))


def test_off_it_is_the_plain_signal() -> None:
    off = TrainConfig(steps=1).elastic
    assert type(make_network(model(), off)) is Classifier
    assert type(objective()[1]) is Classify
    assert isinstance(objective(elastic__sample=True)[1], Objective)


def test_every_number_of_registers_is_as_likely_and_given_by_seed_and_step() -> None:
    drawn = [draw(4, 0, step) for step in range(5000)]
    counts = Counter(drawn)
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 18.5  # chi-squared, 4 degrees: p = 0.001
    assert [draw(4, 0, step) for step in range(5000)] == drawn
    assert [draw(4, 1, step) for step in range(5000)] != drawn


def test_a_step_trains_exactly_its_registers() -> None:
    built, elastic = objective(elastic__sample=True)
    seen = set()
    for step in range(12):
        built.zero_grad()
        assert set(elastic.step(batch())) == {"loss"}
        used = [bool(row.abs().sum() > 0) for row in built.registers.tokens.grad]
        assert used == [index < draw(3, 0, step) for index in range(3)]
        seen.add(sum(used))
        elastic.after_step()
    assert seen == {0, 1, 2, 3}


def test_the_loss_is_that_of_the_model_cut_to_its_registers() -> None:
    built, elastic = objective(elastic__sample=True)
    one, targets = batch(), F.one_hot(batch().labels, 5).float()
    for step in range(6):
        alone = VisionTransformer(SHAPES.model_copy(update={"registers": draw(3, 0, step)})).eval()
        tensors = built.state_dict()
        alone.load_state_dict({**tensors, "registers.tokens": tensors["registers.tokens"][: draw(3, 0, step)]})
        expected = F.binary_cross_entropy_with_logits(alone.classify(one.images), targets)
        torch.testing.assert_close(elastic.step(one)["loss"], expected)
        elastic.after_step()


def test_its_place_in_the_draw_is_kept() -> None:
    _, first = objective(elastic__sample=True)
    _, second = objective(elastic__sample=True)
    assert isinstance(first, Elastic)
    assert isinstance(second, Elastic)
    for _ in range(5):
        first.after_step()
    second.load_state_dict(first.state_dict())
    assert second.count() == first.count() == draw(3, 0, 5)


@pytest.mark.parametrize("centred", [True, False])
def test_likeness_is_the_mean_squared_correlation_or_cosine_of_pairs(*, centred: bool) -> None:
    maps = torch.rand(3, 4, 10, dtype=torch.float64)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    table = maps.numpy()
    both = (
        [np.corrcoef(table[b, i], table[b, j])[0, 1] for b in range(3) for i, j in pairs]
        if centred
        else [1 - cosine(table[b, i], table[b, j]) for b in range(3) for i, j in pairs]
    )
    assert likeness(maps, centred=centred).item() == pytest.approx(np.square(both).mean(), abs=1e-12)


def test_likeness_is_1_for_equal_maps_and_0_for_disjoint_or_unrelated_ones() -> None:
    one = torch.rand(2, 1, 8)
    for centred in (True, False):
        torch.testing.assert_close(likeness(torch.cat([one, 2 * one], dim=1), centred=centred), torch.tensor(1.0))
    disjoint = torch.eye(4)[None].repeat(2, 1, 2)
    assert likeness(disjoint, centred=False) == 0
    unrelated = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]]])
    assert likeness(unrelated, centred=True) == 0
    even = torch.full((1, 3, 4), 0.25, requires_grad=True)
    likeness(even, centred=True).backward()
    assert even.grad.abs().max() == 0


@pytest.mark.parametrize("penalty", ["correlation", "orthogonality"])
def test_gradients_of_the_penalty_equal_finite_differences(penalty: Penalty) -> None:
    network = ElasticClassifier(model().double(), penalty).eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    tokens = network.vit.registers.tokens.detach().clone().requires_grad_()
    weight = network.vit.blocks[1].norm1.weight.detach().clone().requires_grad_()

    def diversity(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        values = {"vit.registers.tokens": tokens, "vit.blocks.1.norm1.weight": weight}
        return torch.func.functional_call(network, values, (images, 3)).diversity

    assert torch.autograd.gradcheck(diversity, (tokens, weight), atol=1e-7)
    assert torch.autograd.grad(diversity(tokens, weight), tokens)[0].abs().max() > 1e-4


@pytest.mark.parametrize("position", ["learned", "rope"])
@torch.no_grad()
def test_maps_are_the_models_attention_and_logits_are_unchanged(position: str) -> None:
    built, images = model(position=position).eval(), batch().images
    judged = ElasticClassifier(built, "correlation")(images, 2)
    view = built.with_registers(2)
    expected = view.attention(images, -1).mean(dim=1)[:, 1:3, 3:]
    torch.testing.assert_close(judged.logits, view.classify(images))
    torch.testing.assert_close(judged.diversity, likeness(expected, centred=True))
    block = view.block(-1)
    maps = register_maps(block.attn, block.norm1(view.stream(images, 1)), view.rotation(images), view.prefix)
    torch.testing.assert_close(maps, expected)
    assert not block.attn._forward_pre_hooks


def flops(network: torch.nn.Module, *arguments: object) -> int:
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 16, 16), *arguments)
    return counter.get_total_flops()


def test_without_a_weight_no_operation_is_added_and_with_one_a_part_of_one_block() -> None:
    plain = flops(Classifier(model()))
    assert flops(ElasticClassifier(model(), None), 3) == plain
    tokens, width = 20, 8
    maps = 2 * tokens * width * 3 * width + 2 * 3 * tokens * width  # the qkv of one block, and 3 rows of scores
    assert flops(ElasticClassifier(model(), "correlation"), 3) == plain + maps


@pytest.mark.parametrize("penalty", ["correlation", "orthogonality"])
def test_the_penalty_is_added_logged_and_falls(penalty: Penalty) -> None:
    built, elastic = objective(elastic__diversity=10.0, elastic__penalty=penalty)
    one = batch()
    bare = F.binary_cross_entropy_with_logits(built.classify(one.images), F.one_hot(one.labels, 5).float())
    optimizer, found = torch.optim.Adam(built.parameters(), lr=3e-3), []
    for _ in range(25):
        optimizer.zero_grad()
        found.append(elastic.step(one))
        optimizer.step()
    torch.testing.assert_close(found[0]["loss"], bare + 10 * found[0]["diversity"])
    assert found[-1]["diversity"] < found[0]["diversity"] / 2


def test_under_bfloat16_the_maps_keep_float32_differences() -> None:
    built, images = model().eval(), batch().images
    exact = ElasticClassifier(built, "orthogonality")(images, 3).diversity
    with torch.autocast("cpu", torch.bfloat16):
        judged = ElasticClassifier(built, "orthogonality")(images, 3)
    assert judged.diversity.dtype == torch.float32
    torch.testing.assert_close(judged.diversity, exact, rtol=0.05, atol=0)


def test_a_run_resumes_to_the_same_weights_and_its_folder_has_every_count(tmp_path: Path, tiny: "Tiny") -> None:
    changes = {"elastic__sample": True, "elastic__diversity": 0.5, "model__registers": 3}
    whole = train(tiny(out=tmp_path / "whole", **changes))

    def stop(state: TrainState, _metrics: object) -> None:
        if state.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny(out=tmp_path / "cut", **changes), hooks=[stop])
    again = train(tiny(out=tmp_path / "cut", **changes), resume=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert all(0 <= line["diversity"] <= 1 for line in lines)
    images = torch.randn(2, 3, 16, 16)
    loaded = load_model(tmp_path / "whole")
    for count in range(4):
        torch.testing.assert_close(loaded(images, registers=count).patches, whole(images, registers=count).patches)


BAD: dict[str, tuple[dict[str, object], str]] = {
    "sample": ({"elastic__sample": True, "model__registers": 0}, "there is nothing to draw from; give registers"),
    "diversity": ({"elastic__diversity": 0.1, "model__registers": 1}, "it compares registers; give at least 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_registers_that_are_not_there_are_refused(case: str, tiny: Callable[..., TrainConfig]) -> None:
    changes, advice = BAD[case]
    with pytest.raises(InputError, match=advice):
        train(tiny(**changes))
