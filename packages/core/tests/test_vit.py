import math
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F
from vitreg_core import Backbone, VisionTransformer, ViTConfig, create_model
from vitreg_core.errors import InputError
from vitreg_core.weights import timm as timm_weights
from vitreg_core.weights.checkpoint import Checkpoint

TINY = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, registers=2, layer_scale=0.1)


def tiny(**changes: object) -> VisionTransformer:
    return VisionTransformer(TINY.model_copy(update=changes)).eval()


DINOV2_NAMES = (  # ours, official
    ("cls", "cls_token"),
    ("registers.tokens", "register_tokens"),
    ("patch_embed", "patch_embed"),
    ("blocks", "blocks"),
    ("norm", "norm"),
)


def sine(shape: tuple[int, ...], phase: float, scale: float) -> torch.Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(0.7 * steps + phase)).float().reshape(shape)


def official_tensors(model: VisionTransformer) -> dict[str, torch.Tensor]:
    """Values of reference/dinov2.md 6.1, given to the official names in alphabetical order."""
    dim, patches = model.embed_dim, model.positions.patches.shape[0]
    shapes = {
        name: tuple(t.shape) for name, t in model.state_dict().items() if name.startswith(("patch", "blocks", "norm"))
    }
    shapes |= {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + patches, dim), "mask_token": (1, dim)}
    if model.num_registers:
        shapes["register_tokens"] = (1, model.num_registers, dim)
    values = {}
    for index, name in enumerate(sorted(shapes)):
        if name.endswith(("norm1.weight", "norm2.weight")) or name == "norm.weight":
            values[name] = 1 + sine(shapes[name], index, 0.1)
        elif "gamma" in name:
            values[name] = 0.5 + sine(shapes[name], index, 0.1)
        else:
            values[name] = sine(shapes[name], index, 0.05)
    return values


def dinov2_small(registers: int, *, antialias: bool, offset: float) -> VisionTransformer:
    model = create_model(
        "vit_s14",
        image_size=518,
        registers=registers,
        class_position=True,
        position_antialias=antialias,
        position_offset=offset,
    ).eval()
    values = official_tensors(model)
    ours = {name: values[name] for name in model.state_dict() if name in values}
    ours |= {"cls": values["cls_token"][0, 0], "positions.cls": values["pos_embed"][0, 0]}
    ours |= {"positions.patches": values["pos_embed"][0, 1:]}
    ours["registers.tokens"] = values["register_tokens"][0] if registers else torch.empty(0, 384)
    model.load_state_dict(ours)
    return model


GOLDEN = [  # registers, antialias, offset, height, width, cls[:4], mean |patch|, patch 7 [:2], register 0 [:2]
    (0, False, 0.1, 224, 224, (-1.4534, -0.39384, 0.18122, 0.21632), 0.85725, (-1.38934, -0.57127), None),
    (0, False, 0.1, 224, 280, (-1.56182, -0.47308, 0.23559, 0.31300), 0.861385, (-1.53923, -0.49699), None),
    (0, False, 0.1, 518, 518, (-1.45275, -0.39287, 0.18085, 0.21502), 0.859157, (-1.52937, -0.43416), None),
    (
        4,
        True,
        0.0,
        224,
        224,
        (-1.50282, -0.40912, 0.22357, 0.25020),
        0.863468,
        (-1.4602, -0.59059),
        (-1.44404, -0.37716),
    ),
    (
        4,
        True,
        0.0,
        224,
        280,
        (-1.50377, -0.40949, 0.22427, 0.25083),
        0.864944,
        (-1.50752, -0.53801),
        (-1.44496, -0.37805),
    ),
    (
        4,
        True,
        0.0,
        518,
        518,
        (-1.50036, -0.40601, 0.22266, 0.24696),
        0.863239,
        (-1.55982, -0.50646),
        (-1.44329, -0.37670),
    ),
    (
        4,
        False,
        0.1,
        224,
        224,
        (-1.50137, -0.40755, 0.22309, 0.24884),
        0.862134,
        (-1.47006, -0.60006),
        (-1.44333, -0.37794),
    ),
]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: f"reg{golden[0]}-{golden[3]}x{golden[4]}-{golden[2]}")
@torch.no_grad()
def test_dinov2_golden_values(golden: tuple) -> None:
    registers, antialias, offset, height, width, cls, mean, patch, register = golden
    model = dinov2_small(registers, antialias=antialias, offset=offset)
    features = model(sine((1, 3, height, width), 3, 1))
    assert features.cls is not None
    torch.testing.assert_close(features.cls[0, :4], torch.tensor(cls), rtol=0, atol=1e-4)
    assert abs(features.patches.abs().mean().item() - mean) < 1e-4
    torch.testing.assert_close(features.patches[0, 7, :2], torch.tensor(patch), rtol=0, atol=1e-4)
    if register:
        torch.testing.assert_close(features.registers[0, 0, :2], torch.tensor(register), rtol=0, atol=1e-4)
    assert features.grid == (height // 14, width // 14)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (70, 35)])
@torch.no_grad()
def test_tokens_equal_timm(registers: int, size: tuple[int, int]) -> None:
    theirs = timm.models.VisionTransformer(
        img_size=64,
        patch_size=16,
        embed_dim=192,
        depth=3,
        num_heads=3,
        num_classes=7,
        reg_tokens=registers,
        no_embed_class=True,
        init_values=0.1,
        dynamic_img_size=True,
        dynamic_img_pad=False,
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = timm_weights.read(Checkpoint(Path("memory"), theirs.state_dict()))
    ours = VisionTransformer(weights.config).eval()
    ours.load_state_dict(weights.tensors)
    images = torch.randn(2, 3, *(side // 16 * 16 for side in size))
    expected = theirs.forward_features(images)
    features = ours(images)
    assert features.cls is not None
    found = torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.classify(images), theirs(images), rtol=0, atol=1e-5)
    layers = theirs.forward_intermediates(images, indices=[0, 2], norm=True, output_fmt="NLC", intermediates_only=True)
    for mine, other in zip(ours.intermediate(images, [0, 2]), layers, strict=True):
        torch.testing.assert_close(mine.patches, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_registers_carry_no_position_and_stand_between_class_token_and_patches() -> None:
    model = tiny()
    tokens = model.embed(torch.randn(1, 3, 32, 32))
    assert tokens.shape == (1, 1 + 2 + 16, 24)
    torch.testing.assert_close(tokens[0, 1:3], model.registers.tokens)
    torch.testing.assert_close(tokens[0, 0], model.cls)


@torch.no_grad()
def test_looking_inside_agrees_with_the_forward_pass() -> None:
    model, images = tiny(), torch.randn(2, 3, 32, 40)
    block = model.block(1)
    before, after = model.stream(images, 1), model.stream(images, 2)
    weights, values = model.attention(images, 1), model.qkv(images, 1).values
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 23))
    mixed = before + block.ls1(block.attn.proj((weights @ values).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(mixed + block.ls2(block.mlp.output(model.hidden(images, 1))), after)
    raw = model.intermediate(images, [1], norm=False)[0]
    torch.testing.assert_close(raw.patches, after[:, 3:])
    torch.testing.assert_close(model.intermediate(images, [-1, 0])[0].patches, model(images).patches)
    torch.testing.assert_close(raw.patch_map[:, :, 3, 4], raw.patches[:, 3 * 5 + 4])
    with_positions = model.embeddings(images) + model.positions((4, 5))
    torch.testing.assert_close(with_positions, model.embed(images)[:, 3:])


def test_the_model_is_a_backbone() -> None:
    assert isinstance(tiny(), Backbone)


def test_trailing_pixels_change_nothing() -> None:
    model, images = tiny(), torch.randn(1, 3, 32, 40)
    longer = F.pad(images, (0, 7, 0, 3), value=9.0)
    torch.testing.assert_close(model(longer).patches, model(images).patches)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_block_that_is_not_there_is_refused(layer: int) -> None:
    advice = f"layer {layer} of a model with 3 blocks; use 0 to 2, or -1 for the last"
    with pytest.raises(InputError, match=advice):
        tiny().intermediate(torch.zeros(1, 3, 32, 32), [layer])


def test_classifying_without_a_head_is_refused() -> None:
    with pytest.raises(InputError, match="has no classification head; give one that has"):
        tiny().classify(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("changes", "advice"),
    [({"num_heads": 5}, "num_heads=5 does not divide embed_dim=24"), ({"image_size": 4}, "smaller than patch_size=8")],
)
def test_shapes_that_cannot_be_built_are_refused(changes: dict, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        tiny(**changes)


def test_no_weight_decay_names_are_parameters() -> None:
    names = {name for name, _ in tiny().named_parameters()}
    assert tiny().no_weight_decay() == {"cls", "registers.tokens", "positions.patches"} <= names
    assert "positions.cls" in tiny(class_position=True).no_weight_decay()
