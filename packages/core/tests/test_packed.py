import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from vitreg_core import Features, VisionTransformer, ViTConfig
from vitreg_core.attention import QKV, attend, attend_by_products
from vitreg_core.errors import InputError

TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "layer_scale": 0.5}
KINDS = {
    "learned": {"registers": 2, "class_position": True},
    "rope": {"registers": 4, "position": "rope", "qk_norm": True, "feed_forward": "swiglu"},
    "no class": {"class_token": False, "pool": "avg", "registers": 1, "pre_norm": True},
}


def model(kind: str, **changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    built = VisionTransformer(ViTConfig(**(TINY | KINDS[kind] | changes)))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built.eval()


def crops() -> list[Tensor]:
    """Two global crops, four local ones, and one of another shape."""
    torch.manual_seed(1)
    return [torch.randn(2, 3, 32, 32), torch.randn(4, 3, 16, 16), torch.randn(1, 3, 24, 43)]


def values(features: list[Features]) -> Tensor:
    return torch.cat([part.tokens.flatten() for part in features])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_batches_equal_separate_ones_with_their_gradients(kind: str) -> None:
    network, batches = model(kind), crops()
    packed, separate = network.packed(batches), [network(images) for images in batches]
    assert [part.grid for part in packed] == [(4, 4), (2, 2), (3, 5)]
    torch.testing.assert_close(values(packed), values(separate), rtol=0, atol=2e-6)
    parameters = [parameter for name, parameter in network.named_parameters() if name != "positions.none"]
    weights = torch.randn(len(values(packed)))
    mine = torch.autograd.grad((values(packed) * weights).sum(), parameters)
    theirs = torch.autograd.grad((values(separate) * weights).sum(), parameters)
    for name, one, other in zip([n for n, _ in network.named_parameters()], mine, theirs, strict=True):
        scale = other.abs().max()
        assert (one - other).abs().max() <= 1e-5 * scale + 1e-6, name


def test_masks_of_packed_batches_are_their_own() -> None:
    network, batches = model("learned", mask_token=True), crops()[:2]
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[1, 3:7] = True
    packed = network.packed(batches, masks=[masks, None])
    torch.testing.assert_close(packed[0].patches, network(batches[0], masks).patches)
    torch.testing.assert_close(packed[1].patches, network(batches[1]).patches)


def test_the_mask_token_stands_in_for_the_embedding_but_not_for_the_position() -> None:
    network, images = model("learned", mask_token=True), crops()[0]
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, 5] = True
    changed = images.clone()
    changed[0, :, 8:16, 8:16] = 7.0  # patch 5
    torch.testing.assert_close(network(images, masks).patches, network(changed, masks).patches)
    assert not torch.allclose(network(images).patches, network(changed).patches)
    first = network.embed(images, masks)[0, network.num_prefix_tokens + 5]
    torch.testing.assert_close(first, network.mask_token + network.positions.patches[5])


def test_an_empty_batch_is_packed_in_training_too() -> None:
    network = model("learned", drop_path=0.5, stochastic_depth="subset").train()
    large, none = network.packed([crops()[0], crops()[0][:0]])
    assert (len(large.patches), len(none.patches)) == (2, 0)


def test_what_cannot_be_packed_or_masked_is_refused() -> None:
    with pytest.raises(InputError, match="0 batches and 0 masks; give one batch or more, and a mask for each"):
        model("learned").packed([])
    with pytest.raises(InputError, match="without a mask token; build it with mask_token=True"):
        model("learned").packed(crops()[:1], masks=[torch.zeros(2, 16, dtype=torch.bool)])
    with pytest.raises(InputError, match=r"masks of shape \(2, 1\) for patches \(2, 16\); give one each"):
        model("learned", mask_token=True)(crops()[0], torch.zeros(2, 1, dtype=torch.bool))


@pytest.mark.parametrize(("images", "tokens"), [(3, 17), (40, 261), (1, 1500)])
def test_products_in_bfloat16_equal_exact_attention(images: int, tokens: int) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(images, 2, tokens, 16) for _ in range(3)]
    rounded = [part.bfloat16() for part in exact]
    wanted = F.scaled_dot_product_attention(*(part.double() for part in rounded))
    error = (attend_by_products(QKV(*rounded)) - wanted).norm() / wanted.norm()
    assert error <= 2**-7  # two roundings of bfloat16
    assert attend(QKV(*rounded)).dtype == torch.bfloat16


def test_bfloat16_weights_and_autocast_take_the_same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        "vitreg_core.attention.attend_by_products", lambda parts: calls.append(1) or attend_by_products(parts)
    )
    network, images = model("learned"), crops()[0]
    with torch.no_grad():
        exact = network(images)
        assert not calls
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = network(images)
        assert len(calls) == network.depth
        pure = network.to(torch.bfloat16)(images)  # images stay float32
    assert len(calls) == 2 * network.depth
    for other in (cast, pure):
        assert F.cosine_similarity(other.patches.float(), exact.patches, dim=-1).min() > 0.99


def test_keys_alone_may_want_a_gradient() -> None:
    exact = [torch.randn(3, 2, 17, 16) for _ in range(3)]
    rounded = [part.bfloat16().requires_grad_(index == 1) for index, part in enumerate(exact)]
    reference = [part.detach().float().requires_grad_() for part in rounded]
    attend(QKV(*rounded)).float().square().sum().backward()
    F.scaled_dot_product_attention(*reference).square().sum().backward()
    assert (rounded[1].grad - reference[1].grad).norm() <= 0.05 * reference[1].grad.norm()


def test_many_scores_are_not_kept_for_a_gradient() -> None:
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    tokens = 800
    parts = QKV(*(torch.randn(1, 2, tokens, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        attend(parts)
    assert kept < tokens**2
