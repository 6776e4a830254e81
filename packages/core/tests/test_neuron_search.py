"""Finding register neurons: planted ones as the known answer, scores and choices by hand."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from edits import CONFIG, model, one_line, scene_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vitreg_core import (
    VisionTransformer,
    as_backbone,
    load_model,
)
from vitreg_core.config import override
from vitreg_core.data.images import list_images, read_image
from vitreg_core.errors import InputError
from vitreg_core.neuron_search import Contrast, Observed, Trial, appearance, choose, mark, observe, pieces, rank, search
from vitreg_core.outliers import Outliers, emergence_block, find_outliers, patch_norms
from vitreg_core.planted import plant_register_neurons
from vitreg_core.test_time import (
    Neuron,
    RegisterNeurons,
    Step,
    find_register_neurons,
    with_test_time_registers,
)


@torch.no_grad()
def test_planted_neurons_are_found_first_and_their_outliers_removed(
    scenes: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    fit, fresh = scenes
    clean = scene_model(depth=5)
    planted, neurons = plant_register_neurons(clean, fit, layer=2)
    blocks = [find_outliers(block) for block in patch_norms(planted, fresh)]
    assert [block.found for block in blocks] == [False] * 2 + [True] * 3
    assert emergence_block([block.found for block in blocks]) == 2
    assert blocks[-1].max_norm > 8 * blocks[-1].median_norm
    assert not any(find_outliers(block).found for block in patch_norms(clean, fresh))
    assert 0.01 < blocks[-1].fraction < 0.06
    found = find_register_neurons(planted, fit)
    assert set(found.neurons[:2]) == set(neurons)
    assert (found.met, found.emergence_block, found.outlier_block) == (True, 2, 4)
    assert (found.images, found.rule, found.source) == (96, "mixture", planted.source)
    assert found.after <= 0.1 * found.before
    assert found.cosine >= 0.98
    mended = with_test_time_registers(planted, found)
    assert mended.num_registers == found.tokens
    norms = patch_norms(mended, fresh)[-1]
    assert not find_outliers(norms).found
    assert norms.max() < blocks[-1].cutoff
    hit = blocks[-1].mask.any(dim=1)
    assert mended.intermediate(fresh, [-1], norm=False)[0].registers[hit].norm(dim=-1).median() > blocks[-1].cutoff
    verdict = find_outliers(patch_norms(planted, fit)[-1])
    assert (found.before, found.cut) == pytest.approx((verdict.fraction, verdict.cut), rel=1e-5)
    in_batches = find_register_neurons(planted, list(fit.split(40)))
    assert in_batches.neurons == found.neurons
    found.save(tmp_path / "neurons.json")
    assert RegisterNeurons.load(tmp_path / "neurons.json") == found


@torch.no_grad()
def test_without_a_class_token_the_mean_patch_guards(scenes: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean = scene_model(depth=4, class_token=False, pool="avg")
    planted, neurons = plant_register_neurons(clean, scenes[0], layer=2)
    found = find_register_neurons(planted, scenes[0], guard=-1.0)
    assert set(found.neurons) == set(neurons)
    edited = with_test_time_registers(planted, found)
    one, other = (net(scenes[0]).patches.mean(dim=1) for net in (edited, planted))
    assert found.cosine == pytest.approx(torch.cosine_similarity(one, other).mean().item(), abs=1e-5)


@torch.no_grad()
def test_a_model_without_outliers_is_left_as_it_is(scenes: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean = scene_model(depth=4)
    found = find_register_neurons(clean, scenes[0])
    assert (found.neurons, found.cutoff, found.met) == ((), None, False)
    assert found.verdict == "no outlier mode on 96 images: there is nothing to move"
    with pytest.raises(InputError, match="there is nothing to move; use the model as it is"):
        with_test_time_registers(clean, found)


@torch.no_grad()
def test_neurons_of_another_model_are_refused(scenes: tuple[torch.Tensor, torch.Tensor]) -> None:
    planted, _ = plant_register_neurons(scene_model(depth=4), scenes[0], layer=2)
    found = find_register_neurons(planted, scenes[0][:32])
    planted.block(0).mlp.fc1.weight[0, 0] += 0.1  # type: ignore[union-attr, operator]
    with pytest.raises(InputError, match=r"whose weights differ from those of .*; find them in this model") as error:
        with_test_time_registers(planted, found)
    assert one_line(error)


def uneven_norms() -> torch.Tensor:
    """Log-normal norms of 64 images that differ tenfold in scale; two patches of each are outliers."""
    numbers = np.random.default_rng(0)
    norms = np.exp(0.1 * numbers.standard_normal((64, 64))) * np.geomspace(3, 30, 64)[:, None]
    norms[:, :2] *= 4
    return torch.from_numpy(norms)


def trial_on(norms: torch.Tensor) -> Trial:
    """A search at a model with these norms after its only block."""
    cut = find_outliers(norms).cut
    assert cut is not None
    return Trial(model(), [], Observed(norms[None].float(), torch.ones(64, 1)), [], tokens=1, block=0, cut=cut)


def test_outliers_are_counted_over_the_median_of_their_image() -> None:
    norms = uneven_norms()
    trial, verdict = trial_on(norms), find_outliers(norms)
    assert trial.above(norms) == verdict.fraction == 2 / 64
    assert (norms > verdict.cutoff).double().mean() > 0.15  # what one norm for all images would count
    mended = norms.clone()
    mended[:48, 0] /= 4
    assert trial.above(mended) == pytest.approx((128 - 48) / 64**2)
    assert trial.above(3 * norms) > 0.9  # over the medians of before, not of the norms given


def test_a_mode_that_marks_nothing_is_none() -> None:
    verdict = find_outliers(uneven_norms())
    assert mark([verdict]) == 0
    assert mark([replace(verdict, mask=torch.zeros_like(verdict.mask))]) is None


@torch.no_grad()
def test_nothing_is_moved_where_nothing_is_marked(
    scenes: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted, _ = plant_register_neurons(scene_model(depth=4), scenes[0], layer=2)

    def unmarked(norms: torch.Tensor) -> Outliers:
        return replace(find_outliers(norms), mask=torch.zeros(norms.shape, dtype=torch.bool))

    monkeypatch.setattr("vitreg_core.neuron_search.find_outliers", unmarked)
    found = find_register_neurons(planted, scenes[0][:32])
    assert (found.neurons, found.cut, found.cutoff, found.outlier_block) == ((), None, None, None)
    assert "there is nothing to move" in found.verdict


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ours", "timm"])
def test_images_run_a_few_at_a_time_and_blocks_leave_no_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timms = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=6, num_heads=3
    )
    net = as_backbone({"ours": model(depth=6), "timm": timms}[kind].eval())
    images = torch.randn(9, 3, 32, 32)
    whole = observe(net, images)
    sizes, alive, outputs = [], [], []

    def look(_block: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        sizes.append(len(output))
        outputs.append(weakref.ref(output))
        alive.append(sum(one() is not None for one in outputs))

    for block in net.blocks:
        block.register_forward_hook(look)
    tokens = net.num_prefix_tokens + 16
    monkeypatch.setattr("vitreg_core.neuron_search.PIECE_BYTES", 2 * 4 * tokens * 8 * 24)
    seen = observe(net, images)
    assert set(sizes) == {1, 2}
    assert max(alive) <= 3
    torch.testing.assert_close(seen.norms, whole.norms)
    torch.testing.assert_close(seen.read, whole.read)
    expected = patch_norms(net, images)
    torch.testing.assert_close(seen.norms, expected)
    sizes.clear()
    rank(net, images, torch.rand(9, 16) < 0.3, range(2))
    assert set(sizes) == {1, 2}


@pytest.mark.parametrize(("heads", "size", "most"), [(16, 518, 2), (3, 224, 32)])
def test_attention_of_large_images_fits(heads: int, size: int, most: int) -> None:
    net = VisionTransformer(override(CONFIG, {"image_size": size, "patch_size": 14, "embed_dim": 12 * heads,
                                              "num_heads": heads, "depth": 1}))  # fmt: skip
    images = torch.zeros(1, 3, size, size).expand(64, -1, -1, -1)
    sizes = {len(piece) for piece in pieces(net, [images[:32], images[32:]])}
    assert max(sizes) == most


def test_images_that_cannot_be_used_are_refused() -> None:
    net = model()
    for images, advice in (
        (torch.randn(15, 3, 32, 32), "15 calibration images; give 16 at least, 100 to 1,000"),
        ([], "0 calibration images; give 16 at least"),
        (iter([torch.randn(16, 3, 32, 32)]), "ends after one pass; give a tensor or a list of batches"),
        ([torch.randn(9, 3, 32, 32), torch.randn(9, 3, 40, 32)], "of several sizes; give images of one size"),
    ):
        with pytest.raises(InputError, match=advice):
            find_register_neurons(net, images)


def test_scores_are_the_difference_of_means_in_standard_deviations() -> None:
    hidden, mask = torch.randn(6, 10, 4) * torch.tensor([1.0, 3.0, 0.2, 1.0]) + 2, torch.rand(6, 9) < 0.2
    hidden[:, :, 3] = 0.0  # never fires elsewhere
    hidden[:, 1:, 3][mask] = 1.0
    contrast = Contrast(mask)
    for part in hidden.split(4):
        contrast(nn.Identity(), (part,))
    patches, rows = hidden[:, 1:].double().numpy(), mask.numpy()
    means, others = patches[rows].mean(axis=0), patches[~rows]
    expected = (means - others.mean(axis=0)) / others.std(axis=0, where=True).clip(1e-3 * others.std(axis=0).mean())
    np.testing.assert_allclose(contrast.scores.numpy(), expected, rtol=1e-6)
    assert expected[3] == pytest.approx(1e3 / others.std(axis=0).mean())


class LargestDouble(TorchDispatchMode):
    """Most numbers of a float64 tensor that anything gave."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.numbers = max(self.numbers, result.numel())
        return result


def test_scores_take_no_copy_of_a_batch_in_double_precision() -> None:
    contrast, hidden = Contrast(torch.rand(32, 9) < 0.2), torch.randn(32, 10, 4)
    with LargestDouble() as largest:
        contrast(nn.Identity(), (hidden,))
    assert 4 <= largest.numbers <= 9 * 4


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 8, 11, 16, 20])
def test_the_smallest_number_of_neurons_is_found(needed: int) -> None:
    asked: list[int] = []

    def attempt(number: int) -> Step:
        asked.append(number)
        return Step(number, 0.0 if number >= needed else 0.1, number < needed, 1 - number / 1000)

    steps = search(attempt, 20, 0.01, 0.9)
    assert choose(steps, 0.01, 0.9).neurons == needed
    assert len(asked) == len(set(asked)) < 11
    assert [step.neurons for step in steps] == sorted(asked)


@pytest.mark.parametrize(
    ("fractions", "cosines", "taken"),
    [
        ((0.5, 0.05, 0.0), (0.99, 0.99, 0.99), 4),  # no mode is left
        ((0.5, 0.05, 0.0), (0.99, 0.99, 0.5), 2),  # but for the guard
        ((0.5, 0.3, 0.0), (0.99, 0.985, 0.5), 2),  # closest within the guard
        ((0.5, 0.3, 0.0), (0.4, 0.3, 0.2), 1),  # closest to the guard
    ],
)
def test_what_comes_closest_is_taken(fractions: tuple[float, ...], cosines: tuple[float, ...], taken: int) -> None:
    steps = [
        Step(number, fraction, found=fraction > 0, cosine=cosine)
        for number, fraction, cosine in zip((1, 2, 4), fractions, cosines, strict=True)
    ]
    assert choose(steps, 0.1, 0.98).neurons == taken


@torch.no_grad()
def test_where_the_guard_cannot_be_kept_the_result_says_so(scenes: tuple[torch.Tensor, torch.Tensor]) -> None:
    planted, _ = plant_register_neurons(scene_model(depth=4), scenes[0], layer=2)
    found = find_register_neurons(planted, scenes[0][:32], guard=0.9999999)
    assert not found.met
    assert "no number of neurons kept 10% or fewer at a cosine 0.9999999" in found.verdict


def test_outliers_are_marked_where_they_are_clearest_when_the_last_block_hides_them() -> None:
    def layer(factor: float) -> torch.Tensor:
        norms = torch.randn(64, 64).mul(0.1).exp() * 10
        norms[:, :2] *= factor
        return norms

    verdicts = [find_outliers(layer(factor)) for factor in (1.0, 3.0, 9.0, 1.0)]
    assert mark(verdicts) == 2
    assert mark([*verdicts, find_outliers(layer(4.0))]) == 4
    assert mark(verdicts[:1]) is None


@pytest.mark.real_data
@torch.no_grad()
def test_the_sample_vit_loses_its_outliers(shared_data: Path) -> None:
    net = load_model(shared_data / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    paths = list_images(shared_data / "imagenet-sample" / "val")[::25]
    images = torch.stack([net.preprocess(read_image(path)) for path in paths])
    found = find_register_neurons(net, images[0::2])
    assert found.neurons[:2] == (Neuron(6, 189), Neuron(6, 59))
    assert (found.met, found.emergence_block, found.outlier_block) == (True, 6, 11)
    before, after = (patch_norms(one, images[1::2])[-1] for one in (net, with_test_time_registers(net, found)))
    assert (before > 300).float().mean() > 0.01
    assert after.max() < 300


def test_an_earlier_mode_of_other_tokens_is_not_where_outliers_appear() -> None:
    numbers = np.random.default_rng(0)
    early, late = np.zeros((64, 64), dtype=bool), np.zeros((64, 64), dtype=bool)
    early[:, 0], late[:, 5:8] = True, True
    high = {0: early, 1: early, 2: early | late, 3: early | late}
    norms = [np.exp(0.1 * numbers.standard_normal((64, 64))) * np.where(high[block], 9, 1) for block in range(4)]
    verdicts = [find_outliers(torch.from_numpy(block)) for block in norms]
    assert [verdict.found for verdict in verdicts] == [True] * 4
    assert appearance(verdicts, 3) == 2
    assert appearance(verdicts, 1) == 0
