import pytest
import torch
from vitreg_core import create_model, list_models
from vitreg_core.errors import InputError

COUNTS = {  # reference/deit3_openclip_accelerate.md 1.4: 1000 classes, 224 px
    "vit_s16": 22_059_496,
    "vit_s16_reg4": 22_061_032,
    "vit_s14_reg4": 22_014_952,
    "vit_s32": 22_887_784,
    "vit_b16": 86_585_320,
    "vit_b14_reg4": 86_496_232,
    "vit_l16_reg4": 304_378_856,
    "vit_l14": 304_251_880,
    "vit_h14_reg4": 632_131_560,
}
DINOV2 = {  # reference/dinov2.md 1.1: 518 px, class position, mask token of embed_dim values included there
    "vit_s14_reg4": 22_058_112 - 384,
    "vit_g14": 1_136_480_768 - 1536,
    "vit_g14_reg4": 1_136_486_912 - 1536,
}


def count(preset: str, **overrides: object) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create_model(preset, **overrides).parameters())


@pytest.mark.parametrize("preset", COUNTS)
def test_parameters_equal_deit3(preset: str) -> None:
    assert count(preset, num_classes=1000) == COUNTS[preset]


@pytest.mark.parametrize("preset", DINOV2)
def test_parameters_equal_dinov2(preset: str) -> None:
    assert count(preset, image_size=518, class_position=True) == DINOV2[preset]


def test_every_listed_model_can_be_built() -> None:
    names = list_models()
    assert len(names) == 6 * 4 * 2
    with torch.device("meta"):
        sizes = {name: create_model(name) for name in names}
    assert {model.patch_size for model in sizes.values()} == {8, 14, 16, 32}
    assert create_model("vit_ti16_reg7").num_registers == 7


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("vit_s16_reg", "did you mean vit_s16_reg4"),
        ("vit_x16", "presets are vit_<size><patch>"),
        ("vit_s15", "unknown preset 'vit_s15'; did you mean"),
    ],
)
def test_unknown_presets_are_refused_with_the_nearest_name(name: str, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        create_model(name)


def test_unknown_fields_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean image_size"):
        create_model("vit_s16", imagesize=64)
