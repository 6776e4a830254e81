"""Test-time registers: the paper's formulas by hand, saved, exported and compiled."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from edits import KINDS, NEURONS, model, one_line, scene_model
from einops import rearrange
from torch import nn
from vitreg_core import (
    capture,
    export_onnx,
    load_model,
    save_model,
)
from vitreg_core.errors import InputError
from vitreg_core.outliers import find_outliers
from vitreg_core.planted import plant_register_neurons
from vitreg_core.test_time import (
    Neuron,
    find_register_neurons,
    with_attention_bias,
    with_test_time_registers,
)


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
