import math
import resource

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from vitreg_core import VisionTransformer, ViTConfig, create_model, model_cost, register_overhead
from vitreg_core.config import override
from vitreg_core.cost import on_meta, parameters
from vitreg_core.errors import InputError
from vitreg_core.presets import preset_config

TINY = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, registers=2, layer_scale=0.1)
SHAPES = {
    "mlp": {},
    "swiglu": {"feed_forward": "swiglu", "layer_scale": None},
    "rope": {"position": "rope", "qk_norm": True},
    "no class token": {"class_token": False, "pool": "avg", "registers": 0},
    "drop path": {"drop_path": 0.3, "stochastic_depth": "subset"},
}


def closed_form(config: ViTConfig, size: int) -> int:
    """FLOPs of a ViT with an MLP of ratio 4: 24 n d^2 + 4 n^2 d per block, and the patch embedding."""
    patches, dim = (size // config.patch_size) ** 2, config.embed_dim
    tokens = patches + len(config.prefix)
    return config.depth * (24 * tokens * dim**2 + 4 * tokens**2 * dim) + 2 * patches * 3 * config.patch_size**2 * dim


@pytest.mark.parametrize(
    ("preset", "flops"), [("vit_s14_reg4", 12_455_184_384), ("vit_l14", 162_023_964_672)], ids=["S", "L"]
)
def test_flops_equal_the_closed_form(preset: str, flops: int) -> None:
    assert model_cost(preset).flops == closed_form(preset_config(preset), 224) == flops


def test_flops_follow_the_image_size() -> None:
    assert model_cost(TINY, 59).flops == closed_form(TINY, 59)
    assert model_cost(TINY, (32, 64)).flops > model_cost(TINY).flops == model_cost(TINY, 32).flops


# reference/deit3_openclip_accelerate.md 1.4 (head of 1000 classes) and reference/dinov2.md 1.1 (positions at 518 px)
DEIT3 = {"vit_s16": 22_059_496, "vit_s14": 22_013_416, "vit_s32": 22_887_784, "vit_b16": 86_585_320}
DEIT3 |= {"vit_b14": 86_493_160, "vit_b32": 88_241_896, "vit_l16": 304_374_760, "vit_l14": 304_251_880}
DEIT3 |= {"vit_h14": 632_126_440, "vit_l14_reg4": 304_255_976, "vit_h14_reg4": 632_131_560}
DINOV2 = {"vit_s14": 22_056_576, "vit_s14_reg4": 22_058_112, "vit_b14": 86_580_480, "vit_b14_reg4": 86_583_552}
DINOV2 |= {"vit_l14": 304_368_640, "vit_g14": 1_136_480_768, "vit_g14_reg4": 1_136_486_912}


@pytest.mark.parametrize(("preset", "count"), DEIT3.items())
def test_parameters_equal_those_of_deit3(preset: str, count: int) -> None:
    assert parameters(on_meta(override(preset_config(preset), {"num_classes": 1000}))) == count


@pytest.mark.parametrize(("preset", "count"), DINOV2.items())
def test_parameters_equal_those_of_dinov2(preset: str, count: int) -> None:
    changes = {"image_size": 518, "class_position": True, "mask_token": True}
    assert parameters(on_meta(override(preset_config(preset), changes))) == count


def test_the_cost_names_the_parameters_of_the_model_itself() -> None:
    model = create_model("vit_ti16_reg4", depth=2, num_classes=5)
    assert model_cost(model.config).parameters == sum(parameter.numel() for parameter in model.parameters())


def bytes_kept(model: VisionTransformer, images: torch.Tensor) -> int:
    """Memory that stays reachable for the backward pass of a real forward pass, by address."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    owned = {parameter.data_ptr() for parameter in model.parameters()}
    assert output.patches.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in owned)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", [(32, 32), (59, 48)])
def test_training_memory_is_what_autograd_keeps_of_a_real_model(changes: dict, size: tuple[int, int]) -> None:
    config = override(TINY, changes)
    real = VisionTransformer(override(config, {"drop_path": 0.0}))
    assert model_cost(config, size).training_bytes == bytes_kept(real, torch.randn(1, 3, *size))
    batch = bytes_kept(real, torch.randn(4, 3, *size)) / 4  # what is shared by the images of a batch counts less
    assert batch == pytest.approx(model_cost(config, size).training_bytes, rel=0.03)


def test_training_memory_of_a_block_equals_the_closed_form() -> None:
    shallow, deep = (model_cost(override(TINY, {"depth": depth})).training_bytes for depth in (2, 3))
    tokens, dim, heads = 16 + 3, 24, 3
    # in units of tokens x dim: inputs of two norms and what they give 4, qkv 3, attention 1, GELU 8, LayerScale 2
    floats = 18 * tokens * dim + 4 * tokens + heads * tokens  # means and deviations of the norms; log-sum-exp
    assert deep - shallow == pytest.approx(4 * floats, abs=64)


def profiled_peak(model: VisionTransformer, images: torch.Tensor) -> int:
    """Highest sum of torch's own records of allocated and freed memory."""
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        model(images)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_inference_memory_is_the_peak_that_the_profiler_sees(changes: dict) -> None:
    model = VisionTransformer(override(TINY, changes)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model(images)
    assert model_cost(model.config, 64).inference_bytes == profiled_peak(model, images)


def test_nothing_of_the_size_of_the_model_is_allocated() -> None:
    model_cost(TINY)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert model_cost("vit_g14_reg4").parameters > 1e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB; the weights would take 4,500,000


def test_registers_cost_what_the_paper_says() -> None:
    """Registers paper, appendix B and Fig. 12: L/14 at 224 px, below 2 % at 4 and up to 6 % at 16."""
    config = override(preset_config("vit_l14_reg4"), {"depth": 24})
    overhead = register_overhead(config, (0, 4, 16))
    assert [round(100 * value, 2) for value in overhead.flops.tolist()] == [0.0, 1.62, 6.48]
    base = override(config, {"registers": 0})
    for count, value in zip((0, 4, 16), overhead.flops.tolist(), strict=True):
        expected = closed_form(override(config, {"registers": count}), 224) / closed_form(base, 224) - 1
        assert math.isclose(value, expected, abs_tol=1e-12)
    assert overhead.parameters.tolist() == pytest.approx([n * 1024 / parameters(on_meta(base)) for n in (0, 4, 16)])


def test_the_overhead_covers_the_figure_by_default() -> None:
    overhead = register_overhead(TINY)
    assert overhead.flops.shape == overhead.parameters.shape == (17,)
    assert overhead.flops[0] == 0
    assert (overhead.flops.diff() > 0).all()


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(InputError, match="image of 7x32 pixels is smaller than one patch of 8; give larger images"):
        model_cost(TINY, (7, 32))
    with pytest.raises(InputError, match="unknown preset 'vit_s15'; did you mean vit_s16"):
        model_cost("vit_s15")
    with pytest.raises(InputError, match=r"registers=-1: .*greater than or equal to 0"):
        register_overhead(TINY, (-1,))
