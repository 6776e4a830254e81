from collections.abc import Callable

import open_clip
import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn
from vitreg_core import VisionTransformer, ViTConfig, as_backbone, capture
from vitreg_core.errors import InputError
from vitreg_core.replace_registers import KINDS, derangement, register_statistics, replace_registers

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def ours() -> nn.Module:
    config = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, registers=2, num_classes=5)
    return VisionTransformer(config)


def timm_model() -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(**SIZE, reg_tokens=2, no_embed_class=True)


def without_class_token() -> nn.Module:
    options = {"class_token": False, "global_pool": "avg", "reg_tokens": 2, "no_embed_class": True}
    return timm.models.vision_transformer.VisionTransformer(**SIZE, **options)


def transformers_model() -> nn.Module:
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 8, "image_size": 32}
    config = hf.Dinov2WithRegistersConfig(**sizes, mlp_ratio=2, num_register_tokens=2, attn_implementation="eager")
    return hf.Dinov2WithRegistersModel(config)


MODELS = {"ours": ours, "timm": timm_model, "no class token": without_class_token, "transformers": transformers_model}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A model with two registers and parameters that matter."""
    torch.manual_seed(0)
    built = MODELS[request.param]().eval()
    with torch.no_grad():
        for value in built.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return built


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def after(model: nn.Module, images: Tensor) -> Tensor:
    """Tokens after every block, `depth b n d`."""
    with capture(model) as captured, torch.no_grad():
        as_backbone(model).features(images)
    return torch.stack([captured.after[layer] for layer in range(3)])


def where(model: nn.Module) -> slice:
    first = as_backbone(model).prefix.count("cls")
    return slice(first, first + 2)


def run_with(model: nn.Module, images: Tensor, kind: str, **options: object) -> Tensor:
    with replace_registers(model, kind, **options):
        return after(model, images)


def test_statistics_of_batches_are_those_of_all_images(model: nn.Module, images: Tensor) -> None:
    found = register_statistics(model, images.split([1, 3, 2]))
    registers = after(model, images)[:, :, where(model)].double()
    torch.testing.assert_close(found.mean, registers.mean(dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.std, registers.std(dim=1, correction=0), rtol=1e-4, atol=1e-6)
    assert found.images == 6


def test_each_kind_stands_in_the_place_of_the_registers_alone(model: nn.Module, images: Tensor) -> None:
    plain, statistics = after(model, images), register_statistics(model, [images])
    registers, others = where(model), torch.ones(plain.shape[2], dtype=torch.bool)
    others[registers] = False
    for kind in KINDS:
        touched = run_with(model, images, kind, statistics=statistics, layers=[1])
        torch.testing.assert_close(touched[0], plain[0])
        torch.testing.assert_close(touched[1][:, others], plain[1][:, others])
        assert (touched[2][:, others] - plain[2][:, others]).abs().amax() > 1e-4
        put = touched[1][:, registers]
        if kind == "zero":
            assert put.abs().max() == 0
        if kind == "mean":
            torch.testing.assert_close(put, statistics.mean[1].float().expand(put.shape))
        if kind == "shuffled":
            pairs = (put[:, None] - plain[1][None, :, registers]).abs().amax(dim=(2, 3)) < 1e-6
            assert torch.equal(pairs.sum(dim=0), torch.ones(6, dtype=torch.long))
            assert torch.equal(pairs.sum(dim=1), torch.ones(6, dtype=torch.long))
            assert not pairs.diagonal().any()


def test_all_blocks_are_touched_by_default_and_no_hook_is_left(model: nn.Module, images: Tensor) -> None:
    plain = after(model, images)
    touched = run_with(model, images, "zero")
    assert touched[:, :, where(model)].abs().max() == 0
    torch.testing.assert_close(after(model, images), plain, rtol=0, atol=0)
    with pytest.raises(ZeroDivisionError), replace_registers(model, "zero"):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())


def test_zeros_after_a_block_are_what_the_next_one_reads(images: Tensor) -> None:
    torch.manual_seed(0)
    built = ours().eval()
    tokens = built.stream(images, 2)
    tokens[:, 1:3] = 0
    torch.testing.assert_close(run_with(built, images, "zero", layers=[1])[2], built.blocks[2](tokens))
    torch.testing.assert_close(
        run_with(built, images, "zero", layers=[-2, 1]), run_with(built, images, "zero", layers=[1])
    )


def test_noise_has_the_mean_and_the_spread_of_the_registers() -> None:
    torch.manual_seed(0)
    built, images = ours().eval(), torch.randn(4, 3, 32, 32)
    statistics = register_statistics(built, [images])
    put = run_with(built, images[:1].expand(4000, -1, -1, -1), "noise", statistics=statistics, layers=[0])[0][:, 1:3]
    scaled = (put - statistics.mean[0]) / statistics.std[0]
    torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(2, 24).double(), rtol=0, atol=0.1)
    torch.testing.assert_close(scaled.std(dim=0), torch.ones(2, 24).double(), rtol=0, atol=0.1)


@pytest.mark.parametrize("kind", ["shuffled", "noise"])
def test_the_seed_gives_the_same_draws(kind: str, images: Tensor) -> None:
    torch.manual_seed(0)
    built = ours().eval()
    statistics = register_statistics(built, [images])
    first, again, other = (run_with(built, images, kind, statistics=statistics, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_same_registers_everywhere_change_nothing(images: Tensor) -> None:
    torch.manual_seed(0)
    built, same = ours().eval(), images[:1].expand(3, -1, -1, -1)
    plain, statistics = after(built, same), register_statistics(built, [same])
    for kind in ("mean", "shuffled", "noise"):
        torch.testing.assert_close(run_with(built, same, kind, statistics=statistics), plain, rtol=1e-4, atol=1e-5)


def test_no_image_keeps_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([derangement(5, generator) for _ in range(200)])
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(5).expand(200, 5))
    assert not (drawn == torch.arange(5)).any()
    assert all(set(drawn[:, place].tolist()) == set(range(5)) - {place} for place in range(5))


def refused(message: str, build: Callable[[], nn.Module] = ours, kind: str = "zero", **options: object) -> None:
    built = build().eval()
    with pytest.raises(InputError, match=message), replace_registers(built, kind, **options):
        as_backbone(built).features(torch.zeros(1, 3, 32, 32))


def test_mistakes_are_told() -> None:
    refused("shuffled registers of a batch of 1 image; give two or more", kind="shuffled")
    refused("unknown replacement 'zeros'.*zero.*; use one of zero, mean, shuffled, noise", kind="zeros")
    refused("replacement mean without statistics; give register_statistics", kind="mean")
    refused("layer 3 of a model with 3 blocks; use 0 to 2", layers=[3])
    refused(
        "VisionTransformer has no registers to replace; give a model with registers",
        lambda: open_clip.transformer.VisionTransformer(32, 8, 24, 3, 3, 2.0),
    )
    with pytest.raises(InputError, match="0 images to take the mean register of"):
        register_statistics(ours(), [])
    built = ours().eval()
    with pytest.raises(InputError, match="packed batches"), replace_registers(built, "zero"):
        built.packed([torch.zeros(2, 3, 32, 32), torch.zeros(1, 3, 16, 16)])
