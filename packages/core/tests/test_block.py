import pytest
import torch
from timm.layers import DropPath as TimmDropPath
from torch import Tensor
from vitreg_core import ViTConfig
from vitreg_core.attention import Group, Groups, pack, unpack
from vitreg_core.block import Block, DropPath, drop_path_rates


def doubled(tokens: Tensor, groups: Groups) -> Tensor:
    """A branch that tells how often it ran for a token: it writes the token itself."""
    return tokens


def test_dropping_samples_keeps_the_mean_and_whole_images() -> None:
    drop, ones = DropPath(0.25, subset=False).train(), torch.ones(4000, 3, 1)
    added = drop(ones, doubled) - ones
    torch.testing.assert_close(added.unique(), torch.tensor([0.0, 4 / 3]))
    assert torch.equal(added[:, 0], added[:, 2])
    assert abs(added.mean().item() - 1) < 0.04


def test_dropping_samples_draws_as_timm_does() -> None:
    tokens = torch.randn(64, 3, 5)
    torch.manual_seed(3)
    theirs = tokens + TimmDropPath(0.3).train()(tokens)
    torch.manual_seed(3)
    torch.testing.assert_close(DropPath(0.3, subset=False).train()(tokens, doubled), theirs)


@pytest.mark.parametrize("subset", [True, False])
def test_nothing_is_dropped_outside_training(*, subset: bool) -> None:
    tokens = torch.randn(4, 3, 5)
    assert torch.equal(DropPath(0.5, subset=subset).eval()(tokens, doubled), 2 * tokens)


# reference/dinov2.md 1.6
@pytest.mark.parametrize(
    ("probability", "batch", "kept"),
    [(0.3, 2, 1), (0.3, 10, 7), (0.3, 16, 11), (0.3, 64, 44), (0.4, 24, 14), (0.4, 96, 57), (0.9, 3, 1)],
)
def test_a_subset_has_its_size_and_weight(probability: float, batch: int, kept: int) -> None:
    ones = torch.ones(batch, 3, 1)
    added = DropPath(probability, subset=True).train()(ones, doubled) - ones
    assert (added[:, 0, 0] > 0).sum() == kept
    torch.testing.assert_close(added.unique(), torch.tensor([0.0, batch / kept]))
    assert torch.equal(added[:, 0], added[:, 2])


def test_up_to_a_tenth_subsets_are_samples() -> None:
    tokens = torch.randn(64, 3, 5)
    torch.manual_seed(3)
    by_sample = DropPath(0.1, subset=False).train()(tokens, doubled)
    torch.manual_seed(3)
    assert torch.equal(DropPath(0.1, subset=True).train()(tokens, doubled), by_sample)


@pytest.mark.parametrize(("probability", "subset"), [(0.05, True), (0.4, True), (0.4, False)])
def test_packed_groups_drop_on_their_own(probability: float, *, subset: bool) -> None:
    groups = (Group(10, 7), Group(40, 3))
    ones = torch.ones(1, 10 * 7 + 40 * 3, 1)
    added = DropPath(probability, subset=subset).train()(ones, doubled, groups) - ones
    for part, group in zip(unpack(added, groups), groups, strict=True):
        assert torch.equal(part, part[:, :1].expand_as(part))  # whole images
        if subset:
            kept = max(int(group.images * (1 - probability)), 1)
            assert (part[:, 0, 0] > 0).sum() == kept
            torch.testing.assert_close(part.sum(), torch.tensor(float(group.length)))


def test_the_branch_runs_on_the_subset_alone() -> None:
    seen = []

    def spy(tokens: Tensor, groups: Groups) -> Tensor:
        seen.append((tokens.shape, groups))
        return tokens

    drop = DropPath(0.5, subset=True).train()
    drop(torch.randn(8, 3, 5), spy)
    drop(torch.randn(1, 8 * 3 + 6 * 2, 5), spy, (Group(8, 3), Group(6, 2)))
    assert seen == [((4, 3, 5), ()), ((1, 4 * 3 + 3 * 2, 5), (Group(4, 3), Group(3, 2)))]


def test_gradients_of_a_subset_equal_those_of_a_masked_batch() -> None:
    torch.manual_seed(0)
    block = Block(ViTConfig(embed_dim=24, num_heads=3, stochastic_depth="subset"), 0.5).train()
    tokens = torch.randn(6, 5, 24, requires_grad=True)
    torch.manual_seed(1)
    got = torch.autograd.grad(block(tokens).square().sum(), [tokens, block.attn.qkv.weight, block.mlp.fc1.weight])
    torch.manual_seed(1)
    kept = [torch.zeros(6, 1, 1).index_fill(0, torch.randperm(6)[:3], 2.0) for _ in range(2)]
    middle = tokens + kept[0] * block.attn(block.norm1(tokens))
    wanted = (middle + kept[1] * block.mlp(block.norm2(middle))).square().sum()
    for mine, theirs in zip(
        got, torch.autograd.grad(wanted, [tokens, block.attn.qkv.weight, block.mlp.fc1.weight]), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_packing_and_unpacking_are_inverse() -> None:
    batches = [torch.randn(2, 5, 4), torch.randn(3, 2, 4)]
    groups = (Group(2, 5), Group(3, 2))
    for mine, theirs in zip(unpack(pack(batches), groups), batches, strict=True):
        assert torch.equal(mine, theirs)


def test_rates_are_constant_or_rise_linearly() -> None:
    constant = ViTConfig(depth=4, drop_path=0.3)
    linear = constant.model_copy(update={"drop_path_schedule": "linear"})
    assert drop_path_rates(constant) == [0.3] * 4
    assert drop_path_rates(linear) == pytest.approx([0.0, 0.1, 0.2, 0.3])
