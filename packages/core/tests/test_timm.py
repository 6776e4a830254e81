import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from vitreg_core import VisionTransformer, create_model, list_models, save_model
from vitreg_core.errors import InputError
from vitreg_core.timm import TimmVisionTransformer

TINY = {"embed_dim": 24, "num_heads": 3, "depth": 3, "img_size": 32, "patch_size": 8}
NAME = "vitreg_vit_s16_reg4"


def pair(pool: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights in timm's class and in ours, both built by timm's arguments."""
    arguments = {**TINY, "num_classes": 5, "global_pool": pool}
    ours = timm.create_model(NAME, **arguments, layer_scale=0.1, registers=2).eval()
    theirs = timm.models.VisionTransformer(**arguments, init_values=0.1, reg_tokens=2, no_embed_class=True).eval()
    tensors = dict(ours.state_dict())
    tensors["cls_token"] = tensors.pop("cls")[None, None]
    tensors["reg_token"] = tensors.pop("registers.tokens")[None]
    tensors["pos_embed"] = tensors.pop("positions.patches")[None]
    theirs.load_state_dict(tensors)
    return ours, theirs


def test_every_preset_is_in_the_registry() -> None:
    assert timm.list_models("vitreg_vit_*") == sorted(
        (f"vitreg_{preset}" for preset in list_models()), key=timm.models._registry._natural_key
    )


@pytest.mark.parametrize("pool", ["token", "avg", ""])
@torch.no_grad()
def test_a_registered_model_answers_as_timms_own_class(pool: str) -> None:
    ours, theirs = pair(pool)
    images = torch.randn(2, 3, 32, 32)
    close(ours(images), theirs(images))
    tokens = ours.forward_features(images)
    close(tokens, theirs.forward_features(images))
    close(ours.forward_head(tokens, pre_logits=True), theirs.forward_head(tokens, pre_logits=True))
    for model in (ours, theirs):
        model.reset_classifier(0, global_pool="token")
    close(ours(images), theirs(images))
    assert ours.num_features == theirs.num_features
    assert [type(model.get_classifier()) for model in (ours, theirs)] == [torch.nn.Identity] * 2
    assert torch.equal(ours.features(images).tokens, tokens)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_features_only_gives_timms_maps() -> None:
    ours = timm.create_model(NAME, features_only=True, out_indices=[0, 2], **TINY).eval()
    assert ours.feature_info.channels() == [24, 24]
    assert ours.feature_info.reduction() == [8, 8]
    images = torch.randn(2, 3, 32, 40)
    model = ours.model
    maps = ours(images)
    assert [tuple(found.shape) for found in maps] == [(2, 24, 4, 5)] * 2
    assert torch.equal(maps[1], model.intermediate(images, [2], norm=False)[0].patch_map)


def test_timms_arguments_mean_what_they_mean_there() -> None:
    model = timm.create_model(NAME, num_classes=10, img_size=48, drop_path_rate=0.1, drop_rate=0.0, depth=3)
    assert isinstance(model, TimmVisionTransformer)
    assert (model.num_classes, model.config.size, model.config.registers) == (10, (48, 48), 4)
    theirs = timm.models.VisionTransformer(drop_path_rate=0.1, depth=3, embed_dim=24, num_heads=3, patch_size=8)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in theirs.blocks]
    assert [block.drop_path.probability for block in model.blocks] == pytest.approx(rates)
    assert model.pretrained_cfg["architecture"] == model.default_cfg["architecture"] == NAME
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 224, 224)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"drop_rate": 0.1}, "drop_rate=0.1, in_chans=3: vitreg models have no dropout and 3 channels"),
        ({"in_chans": 1}, "in_chans=1"),
        ({"global_pool": "map"}, "global_pool='map' is not one of 'token', 'avg', ''; give one of these"),
        ({"regsters": 4}, "regsters=4: unknown option; did you mean registers"),
    ],
)
def test_arguments_that_cannot_be_followed_are_named(arguments: dict, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        timm.create_model(NAME, **arguments)


def test_there_are_no_published_weights_to_ask_for() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("vitreg_vit_ti32", pretrained=True, depth=1)


def test_a_saved_model_is_a_checkpoint_for_timm(tmp_path: Path) -> None:
    model = create_model("vit_s16_reg4", image_size=32, patch_size=8, embed_dim=24, num_heads=3, depth=3, num_classes=5)
    save_model(model, tmp_path)
    loaded = timm.create_model(NAME, checkpoint_path=tmp_path / "model.safetensors", num_classes=5, **TINY)
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_registered_model_is_a_tower_of_open_clip(tmp_path: Path) -> None:
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    tower = {"timm_model_name": "vitreg_vit_ti32_reg4", "timm_pool": "token", "timm_proj": "linear", "image_size": 64}
    (tmp_path / "tiny.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": tower, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny.json")
    model = open_clip.create_model("tiny", output_dict=True).eval()
    images = torch.randn(2, 3, 64, 64)
    found = model(images, torch.randint(1, 100, (2, 8)))["image_features"]
    trunk = model.visual.trunk
    assert isinstance(trunk, VisionTransformer)
    wanted = torch.nn.functional.normalize(model.visual.head(trunk.features(images).cls), dim=-1)
    torch.testing.assert_close(found, wanted)
    outputs = model.visual.forward_intermediates(images, indices=2, output_extra_tokens=True)
    assert [tuple(prefix.shape) for prefix in outputs["image_intermediates_prefix"]] == [(2, 5, 192)] * 2


def test_only_this_module_imports_timm() -> None:
    code = "import sys; sys.modules['timm'] = None; import vitreg_core.weights; import vitreg_core.timm"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "InputError: vitreg_core.timm needs timm; install it with: pip install 'vitreg-core[timm]'" in found.stderr
