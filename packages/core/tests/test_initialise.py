import math

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn
from vitreg_core import VisionTransformer, ViTConfig, create_model

SHAPE = {"image_size": 64, "patch_size": 8, "embed_dim": 256, "depth": 2, "num_heads": 4, "registers": 8}


def model(init: str, **changes: object) -> VisionTransformer:
    return VisionTransformer(ViTConfig(**(SHAPE | {"init": init, "layer_scale": 1e-4} | changes)))


def std(values: Tensor) -> float:
    return values.detach().std().item()


def bound(layer: nn.Module) -> float:
    """What torch's default keeps weights and biases within."""
    return 1 / math.sqrt(layer.weight[0].numel())


@pytest.mark.parametrize(("init", "token_std"), [("deit3", 0.02), ("dinov2", 1e-6)])
def test_deit3_and_dinov2_differ_in_their_tokens_alone(init: str, token_std: float) -> None:
    built = model(init, class_position=True, mask_token=True, num_classes=100)
    for tokens in (built.cls, built.registers.tokens):
        assert std(tokens) == pytest.approx(token_std, rel=0.2)
    assert std(built.positions.patches) == pytest.approx(0.02, rel=0.05)
    assert std(built.positions.cls) == pytest.approx(0.02, rel=0.2)
    assert built.mask_token.abs().max() == 0
    for layer in (built.blocks[0].attn.qkv, built.blocks[1].mlp.fc2, built.head):
        assert std(layer.weight) == pytest.approx(0.02, rel=0.05)
        assert layer.bias.abs().max() == 0
    convolution = built.patch_embed.proj
    assert std(convolution.weight) == pytest.approx(bound(convolution) / math.sqrt(3), rel=0.05)
    assert 0.5 * bound(convolution) < convolution.bias.abs().max() <= bound(convolution)
    assert torch.equal(built.blocks[0].ls1.gamma, torch.full((256,), 1e-4))
    assert torch.equal(built.norm.weight, torch.ones(256))


def test_dinov2_starts_as_timm_does_with_registers() -> None:
    theirs = timm.models.VisionTransformer(
        img_size=64,
        patch_size=8,
        embed_dim=256,
        depth=2,
        num_heads=4,
        reg_tokens=8,
        no_embed_class=True,
        init_values=1e-4,
    )
    ours = model("dinov2", num_classes=1000)
    pairs = [(ours.registers.tokens, theirs.reg_token), (ours.cls, theirs.cls_token)]
    pairs += [
        (ours.positions.patches, theirs.pos_embed),
        (ours.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight),
    ]
    pairs += [(ours.blocks[0].ls2.gamma, theirs.blocks[0].ls2.gamma), (ours.head.bias, theirs.head.bias)]
    for mine, other in pairs:
        assert std(mine) == pytest.approx(std(other), rel=0.25, abs=1e-9)


def test_clip_starts_as_open_clip_does() -> None:
    theirs = open_clip.transformer.VisionTransformer(64, 8, 256, 2, 4, 4.0, output_dim=128)
    ours = model(
        "clip",
        registers=0,
        pre_norm=True,
        patch_bias=False,
        class_position=True,
        num_classes=128,
        head_bias=False,
        layer_scale=None,
        norm_eps=1e-5,
    )
    mine, other = ours.blocks[1], theirs.transformer.resblocks[1]
    pairs = [
        (ours.cls, theirs.class_embedding),
        (ours.positions.patches, theirs.positional_embedding[1:]),
        (ours.patch_embed.proj.weight, theirs.conv1.weight),
        (mine.attn.qkv.weight, other.attn.in_proj_weight),
        (mine.attn.qkv.bias, other.attn.in_proj_bias),
        (mine.attn.proj.weight, other.attn.out_proj.weight),
        (mine.attn.proj.bias, other.attn.out_proj.bias),
        (mine.mlp.fc1.weight, other.mlp.c_fc.weight),
        (mine.mlp.fc1.bias, other.mlp.c_fc.bias),
        (mine.mlp.fc2.weight, other.mlp.c_proj.weight),
        (mine.mlp.fc2.bias, other.mlp.c_proj.bias),
        (mine.norm1.weight, other.ln_1.weight),
        (ours.head.weight, theirs.proj.T),
    ]
    for one, another in pairs:
        assert std(one) == pytest.approx(std(another), rel=0.15, abs=1e-9)
        assert one.abs().max().item() == pytest.approx(another.abs().max().item(), rel=0.5, abs=1e-9)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(("init", "wanted"), [("deit3", 0.02), ("dinov2", 1e-6), ("clip", 256**-0.5)])
def test_registers_start_as_the_recipe_or_as_told(init: str, wanted: float) -> None:
    assert std(model(init, registers=64).registers.tokens) == pytest.approx(wanted, rel=0.05)
    assert std(model(init, registers=64, register_std=0.5).registers.tokens) == pytest.approx(0.5, rel=0.05)


def test_registers_of_a_preset_start_apart() -> None:
    assert torch.pdist(create_model("vit_s16_reg4").registers.tokens).min() > 0.3
