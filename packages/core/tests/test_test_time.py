"""Test-time registers: planted neurons as the known answer, the paper's formulas by hand, other libraries' forwards."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers as hf
from einops import rearrange
from open_clip.transformer import VisionTransformer as OpenClipVision
from torch import nn
from vitreg_core import (
    VisionTransformer,
    ViTConfig,
    as_backbone,
    capture,
    create_model,
    export_onnx,
    load_model,
    save_model,
)
from vitreg_core.config import override
from vitreg_core.data.images import list_images, read_image
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError
from vitreg_core.neuron_search import Contrast, appearance, choose, mark, search
from vitreg_core.outliers import emergence_block, find_outliers, patch_norms
from vitreg_core.planted import plant_register_neurons
from vitreg_core.test_time import (
    Neuron,
    RegisterNeurons,
    Step,
    find_register_neurons,
    with_attention_bias,
    with_test_time_registers,
)

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, registers=1, layer_scale=0.5)
NEURONS = [Neuron(1, 5), Neuron(1, 9), Neuron(2, 0)]
KINDS = {
    "plain": {},
    "swiglu": {"feed_forward": "swiglu"},
    "rope": {"position": "rope", "qk_norm": True, "activation": "quick_gelu"},
    "no class token": {"class_token": False, "pool": "avg", "registers": 0},
}


def model(**changes: object) -> VisionTransformer:
    """A small model with weights that matter."""
    built = VisionTransformer(override(CONFIG, {"num_classes": 4, **changes})).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


@torch.no_grad()
def scene_model(depth: int, **changes: object) -> VisionTransformer:
    """A random model whose patch norms are even, as those of trained models are."""
    clean = create_model("vit_ti8", image_size=64, depth=depth, embed_dim=96, layer_scale=0.1, **changes).eval()
    clean.positions.patches.mul_(20)
    return clean


@pytest.fixture(scope="module")
def scenes() -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pictures to fit on, and others."""
    prepare = create_model("vit_ti8", image_size=64, depth=1).preprocess
    fit, fresh = (prepare.normalize(draw_scenes(96, seed=seed).image) for seed in (1, 2))
    return fit, fresh


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Leave out the shape checks, which are no part of a graph."""
    jaxtyping.config.update("jaxtyping_disable", True)  # noqa: FBT003
    yield
    jaxtyping.config.update("jaxtyping_disable", False)  # noqa: FBT003


def one_line(error: pytest.ExceptionInfo[InputError]) -> bool:
    return "\n" not in str(error.value)


# the edited model ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_moved_neuron_is_its_maximum_at_the_new_tokens_and_nothing_elsewhere(kind: str, tokens: int) -> None:
    before, images = model(**KINDS[kind]), torch.randn(3, 3, 32, 32)
    after = with_test_time_registers(before, NEURONS, tokens)
    mlp, first = after.block(1).mlp, before.num_prefix_tokens
    inputs = after.block(1).norm2(after.block(1).after_attention(after.stream(images, 1), after.rotation(images)))
    plain, moved = mlp.mlp.hidden(inputs).numpy(), mlp.hidden(inputs).numpy()  # type: ignore[operator, union-attr]
    expected = plain.copy()
    for image in range(3):
        for unit in (5, 9):
            expected[image, :, unit] = 0
            expected[image, first : first + tokens, unit] = plain[image, :, unit].max()
    np.testing.assert_array_equal(moved, expected)
    torch.testing.assert_close(after.hidden(images, 1), torch.from_numpy(moved))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_new_registers_stand_after_the_others_and_images_do_not_mix(kind: str) -> None:
    before, images = model(**KINDS[kind]), torch.randn(3, 3, 32, 32)
    after = with_test_time_registers(before, NEURONS, 2)
    together = after(images)
    assert together.registers.shape == (3, before.num_registers + 2, 24)
    first = before.num_prefix_tokens
    torch.testing.assert_close(after.embed(images)[:, first : first + 2], torch.zeros(3, 2, 24))
    alone = [after(image[None]) for image in images]
    torch.testing.assert_close(torch.cat([one.tokens for one in alone]), together.tokens, rtol=1e-5, atol=1e-5)
    assert (together.patches - before(images).patches).abs().max() > 1e-3


@torch.no_grad()
def test_tokens_that_are_no_outliers_stay_as_they_are(scenes: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean = scene_model(depth=4)
    for layer in range(4):
        clean.block(layer).ls1.gamma.zero_()  # tokens do not mix, so that only the edit itself can reach them
    planted, neurons = plant_register_neurons(clean, scenes[0], layer=2)
    mended = with_test_time_registers(planted, neurons)
    before, after = (net.intermediate(scenes[1], [-1], norm=False)[0] for net in (planted, mended))
    fires = planted.hidden(scenes[1], 2)[:, 1:, neurons[0].unit].abs() > 1e-7
    assert 0.005 < fires.float().mean() < 0.2
    assert (after.patches - before.patches)[~fires].abs().max() < 1e-5
    torch.testing.assert_close(after.cls, before.cls, rtol=0, atol=1e-5)
    assert (after.patches - before.patches)[find_outliers(before.patches.norm(dim=-1)).mask].norm(dim=-1).min() > 5


def test_the_original_is_left_alone() -> None:
    before = model()
    state = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    with_attention_bias(before, NEURONS, torch.randn(2, 3, 32, 32))
    with_test_time_registers(before, NEURONS)
    assert before.state_dict().keys() == state.keys()
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
    timms = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3)
    for net in (model(), timms):
        with pytest.raises(InputError, match=advice) as error:
            with_test_time_registers(net, neurons)
        assert one_line(error)


def test_no_registers_and_moving_twice_are_refused() -> None:
    with pytest.raises(InputError, match="tokens=0: give one test-time register or more"):
        with_test_time_registers(model(), NEURONS, 0)
    timms = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3)
    biased = with_attention_bias(model(), NEURONS, torch.randn(1, 3, 32, 32))
    for once in (*(with_test_time_registers(net, NEURONS) for net in (model(), timms)), biased):
        with pytest.raises(InputError, match="give all neurons to the original model at once"):
            with_test_time_registers(once, [Neuron(0, 1)])
        with pytest.raises(InputError, match="give all neurons to the original model at once"):
            find_register_neurons(once, torch.randn(16, 3, 32, 32))


@torch.no_grad()
def test_packed_batches_equal_batches() -> None:
    batches = [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 24, 40)]
    for edited in (with_test_time_registers(model(), NEURONS), with_attention_bias(model(), NEURONS, batches[0])):
        for one, packed in zip(batches, edited.packed(batches), strict=True):
            torch.testing.assert_close(packed.tokens, edited(one).tokens)


@torch.no_grad()
def test_moving_is_exact_under_autocast() -> None:
    before, images = model(), torch.randn(2, 3, 32, 32)
    edited = with_test_time_registers(before, NEURONS, 2)
    with torch.autocast("cpu", torch.bfloat16), capture(edited, 1, "hidden") as captured:
        edited(images)
    hidden = captured.hidden[1]
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(hidden[:, 2], hidden[:, 3])
    assert hidden[:, :2, [5, 9]].abs().max() == hidden[:, 4:, [5, 9]].abs().max() == 0
    inside = edited.block(1).mlp.mlp  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    handle = inside.fc1.register_forward_hook(lambda _, __, output: seen.append(output))  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        edited(images)
    handle.remove()
    peaks = nn.functional.gelu(seen[0])[:, :, [5, 9]].amax(dim=1)
    assert torch.equal(hidden[:, 2, [5, 9]], peaks)


COMPILE = """
import torch
from vitreg_core import VisionTransformer, ViTConfig
from vitreg_core.test_time import Neuron, with_attention_bias, with_test_time_registers

torch.set_num_threads(1)
torch.manual_seed(0)
tiny = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "registers": 1}
images, neurons = torch.randn(2, 3, 32, 32), [Neuron(1, 5), Neuron(1, 9)]
with torch.no_grad():
    plain = VisionTransformer(ViTConfig(**tiny)).eval()
    for parameter in plain.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    for edited in (with_test_time_registers(plain, neurons, 2), with_attention_bias(plain, neurons, images)):
        compiled = torch.compile(edited, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images).tokens, edited(images).tokens, rtol=0, atol=1e-5)
        assert (edited(images).patches - plain(images).patches).abs().max() > 1e-3
print("all equal")
"""


def test_edited_models_compile_in_one_graph() -> None:
    """In a process of its own: the shape checks of a test run are no part of a model's graph."""
    command = [sys.executable, "-W", "error", "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "all equal", done.stderr


@torch.no_grad()
def test_exported_files_give_the_same(tmp_path: Path, unchecked: None) -> None:
    images, native = torch.randn(3, 3, 40, 24), torch.randn(2, 3, 32, 32)
    plain, neurons = model(depth=2), NEURONS[:2]
    for edited in (with_test_time_registers(plain, neurons, 2), with_attention_bias(plain, neurons, native)):
        export_onnx(edited, tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        for batch in (images, native):
            names = [output.name for output in session.get_outputs()]
            given = dict(zip(names, session.run(None, {"images": batch.numpy()}), strict=True))
            expected = edited(batch)
            for name in ("cls", "registers", "patches"):
                torch.testing.assert_close(torch.from_numpy(given[name]), getattr(expected, name), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.from_numpy(given["logits"]), edited.classify(batch), rtol=1e-4, atol=1e-4)


# saving -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_edited_models_are_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    images, plain = torch.randn(3, 3, 32, 32), model(**KINDS[kind])
    for name, edited in {
        "registers": with_test_time_registers(plain, NEURONS, 2),
        "biases": with_attention_bias(plain, NEURONS, images, 2),
    }.items():
        save_model(edited, tmp_path / name)
        loaded = load_model(tmp_path / name)
        assert loaded.config == edited.config
        torch.testing.assert_close(loaded(images).tokens, edited(images).tokens, rtol=0, atol=0)
        torch.testing.assert_close(loaded.classify(images), edited.classify(images), rtol=0, atol=0)
        assert not torch.allclose(loaded.classify(images), plain.classify(images), atol=1e-4)


@pytest.mark.parametrize("layout", ["timm", "dinov2"])
def test_other_libraries_cannot_hold_them(layout: str, tmp_path: Path) -> None:
    edited = with_test_time_registers(model(num_classes=0), NEURONS)
    with pytest.raises(InputError, match=f'cannot be written as "{layout}", which needs none; save it as "vitreg"'):
        save_model(edited, tmp_path / "model", layout=layout)  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("moved", "advice"),
    [
        ({"first": 2, "registers": 2}, "test-time registers 2 to 3 of 3 tokens before the patches"),
        ({"neurons": [[1, 96]]}, "unit 96 of block 1"),
        ({"neurons": [[7, 0]]}, "layer 7 of a model with 3 blocks"),
        ({"neurons": [[-1, 0]]}, "greater than or equal to 0"),
        ({"tokens": 1}, "tokens"),
    ],
)
def test_a_damaged_list_of_neurons_is_refused(moved: dict[str, object], advice: str, tmp_path: Path) -> None:
    save_model(with_test_time_registers(model(), NEURONS), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["moved"] |= moved
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=advice) as error:
        load_model(tmp_path)
    assert one_line(error)


# attention biases ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_from_one_image_does_to_it_what_the_register_does(kind: str, tokens: int) -> None:
    plain, image = model(**KINDS[kind]), torch.randn(1, 3, 32, 32)
    registers = with_test_time_registers(plain, NEURONS, tokens)
    biased = with_attention_bias(plain, NEURONS, image, tokens)
    assert biased.prefix == plain.prefix
    assert biased(image).tokens.shape == plain(image).tokens.shape
    torch.testing.assert_close(biased(image).patches, registers(image).patches, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(biased.classify(image), registers.classify(image), rtol=1e-5, atol=1e-5)
    weights, whole, first = biased.attention(image, 2), registers.attention(image, 2), plain.num_prefix_tokens
    kept = [*range(first), *range(first + tokens, whole.shape[-1])]
    torch.testing.assert_close(weights, whole[:, :, kept][..., kept], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_bias_is_the_mean_key_and_value_over_the_images() -> None:
    plain, images = model(), torch.randn(5, 3, 32, 32)
    registers = with_test_time_registers(plain, NEURONS)
    biased = with_attention_bias(plain, NEURONS, [images[:3], images[3:]])
    for layer in range(3):
        parts, attention = registers.qkv(images, layer), biased.block(layer).attn
        torch.testing.assert_close(attention.bias_keys[:, 0], parts.keys[:, :, 2].mean(dim=0))
        torch.testing.assert_close(attention.bias_values[:, 0], parts.values[:, :, 2].mean(dim=0))
    own = biased.qkv(images, 1)
    keys = torch.cat([own.keys, biased.block(1).attn.bias_keys.expand(5, -1, -1, -1)], dim=2)
    values = torch.cat([own.values, biased.block(1).attn.bias_values.expand(5, -1, -1, -1)], dim=2)
    weights = (own.queries @ keys.mT / 8**0.5).softmax(dim=-1)
    inputs = biased.attention_input(images, 1)
    expected = biased.block(1).attn.proj(rearrange(weights @ values, "b h n k -> b n (h k)"))
    torch.testing.assert_close(biased.block(1).attn(inputs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(biased.attention(images, 1), weights[..., :-1])


def test_biases_need_images_and_our_own_model() -> None:
    with pytest.raises(InputError, match="no images to take mean keys and values over"):
        with_attention_bias(model(), NEURONS, [])
    timms = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3)
    with pytest.raises(InputError, match="open the weights by load_model, or take with_test_time_registers"):
        with_attention_bias(timms, NEURONS, torch.randn(2, 3, 32, 32))


# finding ------------------------------------------------------------------------------------------------------------


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


# the file -----------------------------------------------------------------------------------------------------------


RESULT = RegisterNeurons(
    neurons=(Neuron(1, 5),),
    scores=(3.5,),
    tokens=2,
    steps=(Step(1, 0.0, found=False, cosine=0.99),),
    before=0.02,
    after=0.0,
    cosine=0.99,
    met=True,
    cutoff=30.0,
    outlier_block=2,
    emergence_block=1,
    rule="mixture",
    images=100,
    source="here",
    weights="0" * 64,
    remaining=0.1,
    guard=0.98,
)


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    RESULT.save(tmp_path / "neurons.json")
    values = json.loads((tmp_path / "neurons.json").read_text())
    assert values["neurons"] == [{"layer": 1, "unit": 5}]
    assert (values["source"], values["images"], values["weights"]) == ("here", 100, "0" * 64)
    assert values["steps"] == [{"neurons": 1, "fraction": 0.0, "found": False, "cosine": 0.99}]
    assert RegisterNeurons.load(tmp_path / "neurons.json") == RESULT
    with pytest.raises(InputError, match=r"cannot write the register neurons .*; give another path"):
        RESULT.save(tmp_path / "no" / "folder.json")


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"tokens": 0}, "tokens: Input should be greater than 0"),
        ({"neurons": [{"layer": 1}]}, "neurons.0"),
        ({"neurons": [{"layer": -1, "unit": 2}]}, "neurons.0"),
        ({"scores": []}, "1 neurons with 0 scores"),
        ({"scores": ["a"]}, "scores.0"),
        ({"cosine": "nan"}, "cosine"),
        ({"extra": 1}, "extra: "),
        ({"weights": None}, "weights"),
    ],
)
def test_a_damaged_file_is_refused(change: dict[str, object], advice: str, tmp_path: Path) -> None:
    path = tmp_path / "neurons.json"
    RESULT.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=advice) as error:
        RegisterNeurons.load(path)
    assert one_line(error)


def test_no_file_and_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        RegisterNeurons.load(tmp_path / "missing.json")
    (tmp_path / "text").write_text("{")
    with pytest.raises(InputError, match="the file: Invalid JSON") as error:
        RegisterNeurons.load(tmp_path / "text")
    assert one_line(error)


# models of other libraries ------------------------------------------------------------------------------------------


DIM, SIZE = 32, 64
HF = {"hidden_size": DIM, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8, "image_size": SIZE}
TIMM = {"img_size": SIZE, "patch_size": 8, "embed_dim": DIM, "depth": 4, "num_heads": 2, "num_classes": 0}
ROPE = {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True}
FOREIGN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm": (lambda: timm.models.vision_transformer.VisionTransformer(**TIMM), "mlp.fc1"),
    "timm dinov3": (
        lambda: timm.models.eva.Eva(**TIMM, num_reg_tokens=2, no_embed_class=True, **ROPE),
        "mlp.fc1",
    ),
    "ViTModel": (lambda: hf.ViTModel(hf.ViTConfig(**HF, intermediate_size=64)), "mlp.fc1"),
    "DINOv3ViTModel": (
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**HF, intermediate_size=64, num_register_tokens=2)),
        "mlp.up_proj",
    ),
    "open_clip": (
        lambda: OpenClipVision(image_size=SIZE, patch_size=8, width=DIM, layers=4, heads=2, mlp_ratio=2.0),
        "mlp.c_fc",
    ),
}


@torch.no_grad()
def plant(net: nn.Module, path: str, images: torch.Tensor, unit: int = 7) -> Neuron:
    """Let a hidden unit of block 2 fire at a thirtieth of the patches, and write far more than all else."""
    backbone = as_backbone(net)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    block, seen = backbone.blocks[2], []
    first = block.get_submodule(path)
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    backbone.features(images)
    handle.remove()
    patches = seen[0][:, backbone.num_prefix_tokens :]
    direction = torch.randn(patches.shape[-1])
    scores = patches @ direction
    steep = 30 / scores.std()
    first.weight[unit] = direction * steep
    first.bias[unit] = -scores.quantile(0.97) * steep
    second = block.get_submodule("mlp." + {"fc1": "fc2", "up_proj": "down_proj", "c_fc": "c_proj"}[path[4:]])
    second.weight[:, unit] = torch.randn(DIM) * 3
    return Neuron(2, unit)


@torch.no_grad()
@pytest.mark.parametrize("name", FOREIGN)
def test_models_of_other_libraries_are_mended(name: str, scenes: tuple[torch.Tensor, torch.Tensor]) -> None:
    build, path = FOREIGN[name]
    net, images = build().eval(), scenes[0]
    neuron = plant(net, path, images)
    plain = as_backbone(net)
    found = find_register_neurons(net, images, guard=0.0)
    assert found.neurons[0] == neuron
    assert found.after <= 0.1 * found.before
    tokens = plain.features(images[:4]).tokens
    edited = with_test_time_registers(net, found, 2)
    assert edited.num_registers == plain.num_registers + 2
    after = edited.features(images[:4])
    assert after.registers.shape[1] == plain.num_registers + 2
    assert after.patches.shape == plain.features(images[:4]).patches.shape
    alone = torch.cat([edited.features(image[None]).tokens for image in images[:4]])
    torch.testing.assert_close(alone, after.tokens, rtol=1e-4, atol=1e-5)
    hidden, first = edited.hidden(images[:4], 2)[:, :, neuron.unit], plain.num_prefix_tokens
    assert hidden[:, :first].abs().max() == hidden[:, first + 2 :].abs().max() == 0
    assert torch.equal(hidden[:, first], hidden[:, first + 1])
    weights = edited.attention(images[:4], 3)
    assert weights.shape[-1] == plain.attention(images[:4], 3).shape[-1] + 2
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    assert edited.qkv(images[:4], 3).keys.shape[2] == weights.shape[-1]
    norms = patch_norms(edited, images)[-1]
    assert (norms > found.cutoff).float().mean() <= 0.1 * found.before
    torch.testing.assert_close(plain.features(images[:4]).tokens, tokens, rtol=0, atol=0)  # the original is as it was


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "no class token"])
def test_timms_forward_with_registers_equals_ours(kind: str, tmp_path: Path) -> None:
    ours, images = model(**KINDS[kind]), torch.randn(2, 3, 32, 32)
    save_model(ours, tmp_path, layout="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    edited, other = with_test_time_registers(ours, NEURONS, 2), with_test_time_registers(theirs, NEURONS, 2)
    torch.testing.assert_close(other.features(images).tokens, edited(images).tokens, rtol=1e-4, atol=1e-5)
    for layer in range(3):
        torch.testing.assert_close(other.hidden(images, layer), edited.hidden(images, layer), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            other.attention(images, layer), edited.attention(images, layer), rtol=1e-4, atol=1e-5
        )


def test_hidden_units_that_cannot_be_reached_are_named(scenes: tuple[torch.Tensor, torch.Tensor]) -> None:
    net = FOREIGN["timm"][0]().eval()
    plant(net, "mlp.fc1", scenes[0])
    net.blocks[1].mlp = nn.Identity()  # type: ignore[operator, index]
    with pytest.raises(InputError, match=r"has no mlp\.fc2, so its hidden units cannot be read"):
        find_register_neurons(net, scenes[0])
    with pytest.raises(InputError, match=r"has no mlp\.fc2, so its hidden units cannot be read"):
        with_test_time_registers(net, [Neuron(1, 0)])


# planting, and photos -----------------------------------------------------------------------------------------------


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
