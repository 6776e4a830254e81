import open_clip
import pytest
import timm
import torch
from torch.nn import functional as F
from vitreg_core import ViTConfig
from vitreg_core.feed_forward import Mlp, SwiGLU, quick_gelu


def config(embed_dim: int, **changes: object) -> ViTConfig:
    return ViTConfig(embed_dim=embed_dim, **changes)


def test_swiglu_equals_its_definition() -> None:
    layer, tokens = SwiGLU(config(12, feed_forward="swiglu")), torch.randn(2, 5, 12)
    gate, value = (
        F.linear(tokens, w, b) for w, b in zip(layer.w12.weight.chunk(2), layer.w12.bias.chunk(2), strict=True)
    )
    torch.testing.assert_close(layer(tokens), layer.w3(gate * torch.sigmoid(gate) * value))


@pytest.mark.parametrize(("embed_dim", "align", "hidden"), [(1024, 8, 2736), (1536, 8, 4096), (1024, 64, 2752)])
def test_swiglu_rounds_two_thirds_up(embed_dim: int, align: int, hidden: int) -> None:
    with torch.device("meta"):
        layer = SwiGLU(config(embed_dim, feed_forward="swiglu", swiglu_align=align))
    assert layer.hidden_dim == layer.w3.in_features == hidden


def test_swiglu_matches_timm() -> None:
    theirs = timm.layers.SwiGLUPacked(12, 64)
    ours = SwiGLU(config(12, feed_forward="swiglu"))
    assert ours.hidden_dim == 32
    with torch.no_grad():
        ours.w12.weight.copy_(theirs.fc1.weight), ours.w12.bias.copy_(theirs.fc1.bias)
        ours.w3.weight.copy_(theirs.fc2.weight), ours.w3.bias.copy_(theirs.fc2.bias)
    tokens = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(tokens), theirs(tokens))


def test_quick_gelu_matches_open_clip() -> None:
    values = torch.linspace(-8, 8, 101)
    torch.testing.assert_close(quick_gelu(values), open_clip.transformer.QuickGELU()(values))
    assert Mlp(config(12, activation="quick_gelu")).activation is quick_gelu
