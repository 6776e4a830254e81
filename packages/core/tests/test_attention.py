import torch
from torch import nn
from vitreg_core import ViTConfig
from vitreg_core.attention import Attention


def pair() -> tuple[Attention, nn.MultiheadAttention]:
    ours, theirs = (
        Attention(ViTConfig(embed_dim=32, num_heads=4)),
        nn.MultiheadAttention(32, num_heads=4, batch_first=True),
    )
    state = theirs.state_dict()
    names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias"}
    names |= {"proj.weight": "out_proj.weight", "proj.bias": "out_proj.bias"}
    nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict({name: state[theirs_name] for name, theirs_name in names.items()})
    return ours, theirs


def test_attention_matches_torch() -> None:
    ours, theirs = pair()
    tokens = torch.randn(2, 7, 32)
    mixed, weights = theirs(tokens, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(ours(tokens), mixed)
    torch.testing.assert_close(ours.weights(tokens), weights)


def test_weights_and_values_give_what_attention_writes() -> None:
    ours, _ = pair()
    tokens = torch.randn(2, 7, 32)
    mixed = ours.weights(tokens) @ ours.project(tokens).values
    torch.testing.assert_close(ours.proj(mixed.transpose(1, 2).flatten(2)), ours(tokens))
