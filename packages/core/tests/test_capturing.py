import pytest
import torch
from torch import nn
from torch.nn import functional as F
from vitreg_core import InputError, VisionTransformer, ViTConfig, capture
from vitreg_core.capturing import PARTS
from vitreg_core.test_time import Neuron, with_test_time_registers

TINY = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, registers=2, layer_scale=0.5)
KINDS = {
    "learned": {},
    "rope and qk-norm": {"position": "rope", "qk_norm": True, "embed_dim": 48},
    "swiglu": {"feed_forward": "swiglu", "class_token": False, "pool": "avg"},
}


def tiny(**changes: object) -> VisionTransformer:
    model = VisionTransformer(TINY.model_copy(update=changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_equals_the_models_own_methods(kind: str, images: torch.Tensor) -> None:
    model = tiny(**KINDS[kind])
    with capture(model, [0, -1], PARTS) as captured:
        model(images)
    for layer in (0, 2):
        qkv = model.qkv(images, layer)
        own = {
            "before": model.stream(images, layer),
            "after": model.intermediate(images, [layer], norm=False)[0].tokens,
            "queries": qkv.queries,
            "keys": qkv.keys,
            "values": qkv.values,
            "attention": model.attention(images, layer),
            "hidden": model.hidden(images, layer),
        }
        for part, expected in own.items():
            torch.testing.assert_close(getattr(captured, part)[layer], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_weights_and_values_give_what_the_fused_attention_gives(kind: str, images: torch.Tensor) -> None:
    model, outputs = tiny(**KINDS[kind]), []
    handle = model.blocks[1].attn.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    with capture(model, 1, ("attention", "values")) as captured:
        model(images)
    handle.remove()
    torch.testing.assert_close(captured.attention[1].sum(dim=-1), torch.ones_like(captured.attention[1][..., 0]))
    mixed = (captured.attention[1] @ captured.values[1]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(model.blocks[1].attn.proj(mixed), outputs[0], rtol=1e-5, atol=1e-5)


def test_captured_hidden_units_write_the_mlps_share(images: torch.Tensor) -> None:
    model = tiny()
    with capture(model, parts=("hidden", "after")) as captured:
        model(images)
    block = model.blocks[2]
    between = captured.after[2] - block.ls2(block.mlp.fc2(captured.hidden[2]))
    torch.testing.assert_close(F.gelu(block.mlp.fc1(block.norm2(between))), captured.hidden[2], rtol=1e-4, atol=1e-4)


def test_hidden_units_of_an_edited_model_are_the_edited_ones(images: torch.Tensor) -> None:
    model = with_test_time_registers(tiny(), [Neuron(layer=1, unit=5)])
    with capture(model, 1, "hidden") as captured:
        model(images)
    hidden, register = captured.hidden[1], model.num_prefix_tokens - 1
    torch.testing.assert_close(hidden, model.hidden(images, 1))
    assert hidden[:, register, 5].abs().min() > 0
    assert hidden[:, :register, 5].abs().max() == hidden[:, register + 1 :, 5].abs().max() == 0


def test_no_hook_is_left_even_after_an_exception(images: torch.Tensor) -> None:
    model = tiny()
    with capture(model, parts=PARTS):
        assert hooks(model) > 0
    assert hooks(model) == 0
    with pytest.raises(ZeroDivisionError), capture(model, parts=PARTS):
        model(images)
        raise ZeroDivisionError
    assert hooks(model) == 0
    model.blocks[2].mlp = nn.Identity()  # a part is missing after hooks of other blocks are in place
    with pytest.raises(InputError), capture(model, parts="hidden"):
        pass
    assert hooks(model) == 0


def test_passes_are_joined_along_the_batch(images: torch.Tensor) -> None:
    model = tiny()
    with capture(model, -1, ("after", "attention")) as captured:
        for image in images:
            model(image[None])
        assert captured.after[-1].shape[0] == 2  # can be read while the block goes on
        model(images)
    whole = model.intermediate(images, [2], norm=False)[0].tokens
    torch.testing.assert_close(captured.after[2], whole.repeat(2, 1, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(captured.attention[-1], model.attention(images, 2).repeat(2, 1, 1, 1))


def test_parts_are_mappings_over_the_captured_layers(images: torch.Tensor) -> None:
    model = tiny()
    with capture(model, [-1, 0], "after") as captured:
        model(images)
    assert sorted(captured.after) == [0, 2]
    assert -1 in captured.after
    assert 1 not in captured.after
    assert not captured.before
    assert torch.stack(list(captured.after.values())).shape[0] == len(captured.after)


def test_captures_can_nest(images: torch.Tensor) -> None:
    model, other = tiny(), tiny()
    with capture(model, 0) as outer, capture(model, [0, 1]) as inner, capture(other, 0) as aside:
        model(images)
        other(images)
    assert torch.equal(outer.after[0], inner.after[0])
    assert not torch.equal(outer.after[0], aside.after[0])


def test_values_are_detached_and_gradients_stay_as_they_were(images: torch.Tensor) -> None:
    model = tiny()
    model(images).tokens.sum().backward()
    expected = model.blocks[0].attn.qkv.weight.grad.clone()
    model.zero_grad()
    with capture(model, parts=PARTS) as captured:
        model(images).tokens.sum().backward()
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight.grad, expected)
    assert not any(values.requires_grad for part in PARTS for values in getattr(captured, part).values())


def test_values_go_to_the_device_asked_for(images: torch.Tensor) -> None:
    model = tiny()
    with capture(model, 0, PARTS, device="meta") as there, capture(model, 0, PARTS) as here:
        model(images)
    assert {getattr(there, part)[0].device.type for part in PARTS} == {"meta"}
    assert {getattr(here, part)[0].device.type for part in PARTS} == {"cpu"}


def test_gradient_checkpointing_counts_once(images: torch.Tensor) -> None:
    model = tiny().train()
    model.set_grad_checkpointing()
    with capture(model, parts=PARTS) as captured:
        model(images).tokens.sum().backward()
    assert all(len(values) == len(images) for part in PARTS for values in getattr(captured, part).values())


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16 weights"])
def test_bfloat16(autocast: bool, images: torch.Tensor) -> None:  # noqa: FBT001
    model = tiny()
    with capture(model, parts=PARTS) as exact:
        model(images)
    model = model if autocast else model.to(torch.bfloat16)
    with capture(model, parts=PARTS) as captured, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(images)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model.attention(images, 1)
    assert captured.queries[1].dtype == torch.bfloat16
    torch.testing.assert_close(captured.attention[1], expected)
    for part in ("queries", "hidden"):
        near, exactly = getattr(captured, part)[0].float(), getattr(exact, part)[0]
        assert F.cosine_similarity(near.flatten(), exactly.flatten(), dim=0) > 0.999


def test_a_compiled_model_is_refused(images: torch.Tensor) -> None:
    model = tiny()
    compiled = torch.compile(model)
    in_place, inside = tiny(), tiny()
    in_place.compile()
    inside.blocks[1] = torch.compile(inside.blocks[1])
    for refused in (compiled, in_place, inside):
        refusal = pytest.raises(InputError, match=r"is compiled.*give the original model, before torch.compile")
        with refusal, capture(refused):
            pass
    with capture(model, 0) as captured:
        model(images)
    assert captured.after[0].shape[0] == 2


def test_packed_batches_are_refused(images: torch.Tensor) -> None:
    model = tiny()
    refusal = pytest.raises(InputError, match="2 packed batches; call the model on each one by itself")
    with refusal, capture(model, 0, "hidden"):
        model.packed([images, images[:, :, :16]])
    assert hooks(model) == 0


def test_mistakes_are_named(images: torch.Tensor) -> None:
    model = tiny()
    for layers in (3, [0, -4]):
        with pytest.raises(InputError, match="with 3 blocks; use 0 to 2, or -1 for the last"), capture(model, layers):
            pass
    with pytest.raises(InputError, match="unknown part 'query'; did you mean queries"), capture(model, parts="query"):
        pass
    with capture(model, 1, "keys") as captured:
        with pytest.raises(InputError, match="no forward pass yet; run the model inside the with block"):
            captured.keys[1]
        model(images)
        model(images[:, :, :16])
    with pytest.raises(InputError, match="keys of layer 0 was not captured; name both in capture"):
        captured.keys[0]
    with pytest.raises(InputError, match="values of layer 1 was not captured"):
        captured.values[1]
    with pytest.raises(InputError, match=r"shapes \(2, 3, 23, 8\) and \(2, 3, 13, 8\); capture images of one size"):
        captured.keys[1]
