"""Test-time registers in models of other libraries: their own forwards, mended."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers as hf
from edits import KINDS, NEURONS, model
from open_clip.transformer import VisionTransformer as OpenClipVision
from torch import nn
from vitreg_core import (
    as_backbone,
    save_model,
)
from vitreg_core.errors import InputError
from vitreg_core.outliers import patch_norms
from vitreg_core.test_time import (
    Neuron,
    find_register_neurons,
    with_test_time_registers,
)

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


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("own", ["avg", "avg and class token", "avg and position of registers", "rope"])
def test_what_timm_pools_leaves_test_time_registers_out(own: str, size: tuple[int, int]) -> None:
    shapes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 4,
              "global_pool": "avg", "dynamic_img_size": True}  # fmt: skip
    vit = timm.models.vision_transformer.VisionTransformer
    net = {
        "avg": lambda: vit(**shapes, class_token=False),
        "avg and class token": lambda: vit(**shapes),
        "avg and position of registers": lambda: vit(**shapes, reg_tokens=2),
        "rope": lambda: timm.models.eva.Eva(**shapes, num_reg_tokens=2, use_rot_pos_emb=True),
    }[own]().eval()
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    images, plain = torch.randn(3, 3, *size), as_backbone(net)
    edited = with_test_time_registers(net, NEURONS, 2)
    inner = edited.model
    first = plain.num_prefix_tokens
    for _ in range(2):  # the second pass starts where the first one ended
        tokens = inner.forward_features(images)
        assert tokens.shape[1] == first + 2 + size[0] * size[1] // 64
        by_hand = inner.head(inner.fc_norm(tokens[:, first + 2 :].mean(dim=1)))
        torch.testing.assert_close(inner(images), by_hand, rtol=1e-5, atol=1e-5)
    assert (net(images) - by_hand).abs().max() > 1e-3
    assert inner.num_prefix_tokens == first + 2 == net.num_prefix_tokens + 2
    assert getattr(inner, "num_reg_tokens", 2) == getattr(net, "num_reg_tokens", 0) + 2
    seen: list[torch.Tensor] = []
    for one in (net, inner):  # the norm of block 0 reads the tokens with their positions
        one.blocks[0].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        one(images)
    torch.testing.assert_close(seen[1][:, [*range(first), *range(first + 2, seen[1].shape[1])]], seen[0])


def test_hidden_units_that_cannot_be_reached_are_named(scenes: tuple[torch.Tensor, torch.Tensor]) -> None:
    net = FOREIGN["timm"][0]().eval()
    plant(net, "mlp.fc1", scenes[0])
    net.blocks[1].mlp = nn.Identity()  # type: ignore[operator, index]
    with pytest.raises(InputError, match=r"has no mlp\.fc2, so its hidden units cannot be read"):
        find_register_neurons(net, scenes[0])
    with pytest.raises(InputError, match=r"has no mlp\.fc2, so its hidden units cannot be read"):
        with_test_time_registers(net, [Neuron(1, 0)])
