import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from vitreg_core import PreprocessConfig, VisionTransformer, ViTConfig, as_backbone, load_model, save_model
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_core.test_time import Neuron, with_test_time_registers

ROOT = Path(__file__).parents[3]
BASE = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
CLIP = {"norm_eps": 1e-5, "pre_norm": True, "patch_bias": False, "init": "clip", "class_position": True}
TIMM = {
    "plain": {"class_position": True, "num_classes": 5},
    "registers": {"registers": 3, "layer_scale": 0.1, "num_classes": 5},
    "registers and class position": {"registers": 2, "class_position": True},
    "mask token": {"registers": 1, "mask_token": True},
    "no class token": {"class_token": False, "pool": "avg", "norm_pooled": True, "registers": 2, "num_classes": 5},
    "mean of the patches": {"pool": "avg", "num_classes": 5},
    "clip": {**CLIP, "num_classes": 7, "head_bias": False},
    "quick gelu": {**CLIP, "activation": "quick_gelu"},
    "pre-norm, other eps": {"pre_norm": True, "patch_bias": False, "norm_eps": 1e-6},
    "wide eps": {"norm_eps": 1e-5},
    "no biases": {"patch_bias": False, "qkv_bias": False},
    "qk-norm": {"qk_norm": True, "registers": 4},
    "swiglu": {"feed_forward": "swiglu", "layer_scale": 1.0, "registers": 4},
    "odd mlp": {"mlp_ratio": 2.7, "num_heads": 2},
    "not square": {"image_size": (24, 40), "registers": 1},
}
FOLDED = {"registers and class position", "mask token", "clip", "no biases"}


def model_of(changes: dict, **more: object) -> VisionTransformer:
    """A small model, every value of which is away from its start."""
    preprocess = PreprocessConfig(image_size=32, crop_ratio=0.8, interpolation="bilinear", mean=(0.1, 0.2, 0.3))
    model = VisionTransformer(override(BASE, {**changes, **more}), preprocess).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("kind", TIMM)
@torch.no_grad()
def test_a_timm_folder_gives_the_same_numbers_everywhere(kind: str, tmp_path: Path) -> None:
    model = model_of(TIMM[kind])
    save_model(model, tmp_path / "timm", layout="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    wrapped = transformers.AutoModel.from_pretrained(tmp_path / "timm").eval()
    again = load_model(tmp_path / "timm")
    assert (theirs.num_classes, again.config.num_classes) == (model.config.num_classes,) * 2
    for size in (model.config.size, (24, 48), (16, 16)):
        images = torch.randn(2, 3, *size)
        tokens, read = model.forward_features(images), model.forward_head(model.forward_features(images))
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        close(theirs.forward_features(images), tokens)
        close(theirs(images), read)
        outputs = wrapped(images)
        close(outputs.last_hidden_state, tokens)
        close(outputs.pooler_output, pooled)
        assert torch.equal(again.forward_features(images), tokens)
        assert torch.equal(again.forward_head(tokens), read)


def close(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in TIMM if kind not in FOLDED])
def test_a_timm_folder_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = model_of(TIMM[kind], drop_path=0.1)
    save_model(model, tmp_path, layout="timm")
    again = load_model(tmp_path)
    assert (again.config, again.preprocess.config) == (model.config, model.preprocess.config)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_transformers_prepares_images_as_we_do(tmp_path: Path) -> None:
    model = model_of({})
    save_model(model, tmp_path, layout="timm")
    picture = Image.effect_mandelbrot((70, 50), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(picture)["pixel_values"][0]
    torch.testing.assert_close(model.preprocess(picture), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"position": "rope"}, "position='rope' cannot be written as \"timm\", which needs learned positions"),
        ({"position_offset": 0.1}, "position_offset=0.1 .* needs 0, as timm resizes"),
        ({"position_antialias": False}, "position_antialias=False .* needs True, as timm resizes"),
        ({"pre_norm": True}, "patch_bias=True .* needs False where pre_norm is True"),
        ({"norm_eps": 1e-12}, "norm_eps=1e-12 .* needs 1e-6, or 1e-5 with an MLP"),
        ({"norm_eps": 1e-5, "feed_forward": "swiglu"}, "norm_eps=1e-05 .* needs 1e-6, or 1e-5 with an MLP"),
    ],
)
def test_what_timm_cannot_compute_is_refused(changes: dict, advice: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=advice):
        save_model(model_of(changes), tmp_path / "timm", layout="timm")
    assert not (tmp_path / "timm").exists()


DINOV2 = {
    "registers": {"registers": 4, "class_position": True, "layer_scale": 1.0, "mask_token": True},
    "deit3": {"registers": 1},
    "without registers": {"position_offset": 0.1, "position_antialias": False, "class_position": True},
    "swiglu": {"feed_forward": "swiglu", "registers": 2, "embed_dim": 36},
}


@pytest.mark.parametrize("kind", DINOV2)
@torch.no_grad()
def test_dinov2_files_come_back_with_the_same_numbers(kind: str, tmp_path: Path) -> None:
    model = model_of(DINOV2[kind])
    save_model(model, tmp_path, layout="dinov2")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]
    again = load_model(tmp_path / "model.pth", num_heads=3)
    for size in ((32, 32), (24, 48)):
        images = torch.randn(2, 3, *size)
        assert torch.equal(again.forward_features(images), model.forward_features(images))


def test_dinov2_files_hold_the_tensors_of_the_released_ones(tmp_path: Path) -> None:
    config = ViTConfig(image_size=518, patch_size=14, embed_dim=384, depth=1, registers=4)
    save_model(VisionTransformer(config), tmp_path, layout="dinov2")
    found = torch.load(tmp_path / "model.pth", weights_only=True)
    block = {
        **{f"{name}.{part}": (384,) for name in ("norm1", "norm2") for part in ("weight", "bias")},
        "attn.qkv.weight": (1152, 384),
        "attn.qkv.bias": (1152,),
        "attn.proj.weight": (384, 384),
        "attn.proj.bias": (384,),
        "ls1.gamma": (384,),
        "ls2.gamma": (384,),
        "mlp.fc1.weight": (1536, 384),
        "mlp.fc1.bias": (1536,),
        "mlp.fc2.weight": (384, 1536),
        "mlp.fc2.bias": (384,),
    }
    stem = {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 1370, 384),
        "register_tokens": (1, 4, 384),
        "mask_token": (1, 384),
        "patch_embed.proj.weight": (384, 3, 14, 14),
        "patch_embed.proj.bias": (384,),
        "norm.weight": (384,),
        "norm.bias": (384,),
    }
    wanted = {**stem, **{f"blocks.0.{name}": shape for name, shape in block.items()}}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == wanted
    assert not found["pos_embed"][0, 0].any()
    assert not found["mask_token"].any()
    assert (found["blocks.0.ls1.gamma"] == 1).all()


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"position": "rope"}, "position='rope' cannot be written as \"dinov2\", which needs learned positions"),
        ({"image_size": (32, 40)}, "image_size=.* needs a square grid of patches"),
        ({"class_token": False, "pool": "avg"}, "class_token=False .* needs True"),
        ({"pre_norm": True}, "pre_norm=True .* needs False"),
        ({"norm_pooled": True}, "norm_pooled=True .* needs False"),
        ({"num_classes": 3}, r"num_classes=3 .* needs 0; drop the head by model.reset_classifier\(0\)"),
        ({"patch_bias": False}, "patch_bias=False .* needs True"),
        ({"qkv_bias": False}, "qkv_bias=False .* needs True"),
        ({"qk_norm": True}, "qk_norm=True .* needs False"),
        ({"activation": "quick_gelu"}, "activation='quick_gelu' .* needs gelu"),
        ({"norm_eps": 1e-5}, "norm_eps=1e-05 .* needs 1e-6"),
        ({"feed_forward": "swiglu", "swiglu_align": 1, "mlp_ratio": 3.9}, "swiglu_align=1 .* needs a multiple of 8"),
    ],
)
def test_what_dinov2_cannot_compute_is_refused(changes: dict, advice: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=advice):
        save_model(model_of(changes), tmp_path / "dinov2", layout="dinov2")
    assert not (tmp_path / "dinov2").exists()


def test_dropping_the_head_as_advised_helps(tmp_path: Path) -> None:
    model = model_of({"num_classes": 3, "registers": 1})
    model.reset_classifier(0)
    save_model(model, tmp_path, layout="dinov2")


def test_another_way_to_resize_positions_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"interpolate_offset=0.0, interpolate_antialias=True"):
        save_model(model_of({}), tmp_path, layout="dinov2")


@pytest.mark.parametrize("layout", ["timm", "dinov2"])
def test_neither_a_changed_model_nor_an_unwritable_folder_is_written(layout: str, tmp_path: Path) -> None:
    changed = model_of({"registers": 1})
    changed.block(0).mlp.fc1 = torch.nn.Linear(BASE.embed_dim, 5)
    with pytest.raises(InputError, match="save the one it was made from"):
        save_model(changed, tmp_path / "new", layout=layout)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="give another folder"):
        save_model(model_of({"registers": 1}), tmp_path / "file", layout=layout)


@pytest.mark.parametrize("layout", ["vitreg", "timm", "dinov2"])
def test_models_of_other_libraries_are_refused(layout: str, tmp_path: Path) -> None:
    import vitreg_core.weights

    unchecked = vitreg_core.weights.save_model.__wrapped__  # the type check of the test run would come first
    theirs = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2)
    for model in (theirs, as_backbone(theirs), with_test_time_registers(theirs, [Neuron(1, 3)])):
        with pytest.raises(InputError, match=r"VisionTransformer is no vitreg model .*load_model\(SOURCE\)") as error:
            unchecked(model, tmp_path / "new", layout=layout)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_unknown_layouts_get_the_nearest(tmp_path: Path) -> None:
    import vitreg_core.weights

    unchecked = vitreg_core.weights.save_model.__wrapped__  # the type check of the test run would come first
    with pytest.raises(InputError, match="layout='dino2' is not one of vitreg, timm, dinov2; did you mean dinov2"):
        unchecked(model_of({}), tmp_path, layout="dino2")


def test_a_model_goes_to_the_hub_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_of({"registers": 2}), []

    def upload(*, repo_id: str, folder_path: str, commit_message: str) -> None:
        for file in Path(folder_path).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())

    def fetch(repository: str, file: str, **options: object) -> str:
        if not (tmp_path / file).exists():
            raise huggingface_hub.errors.EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *names, **options: calls.append((names, options)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert model.push_to_hub("me/vit", private=True) == "https://huggingface.co/me/vit"
    assert calls == [(("me/vit",), {"private": True, "exist_ok": True})]
    card = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("me/vit")' in card
    assert "with 2 registers: patches of 8 pixels, width 24, 2 blocks" in card
    again = VisionTransformer.from_pretrained("me/vit")
    assert again.source == "hub:me/vit"
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), again.parameters(), strict=True))


def test_a_folder_named_like_a_repository_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(model_of({}), "me/vit")
    assert VisionTransformer.from_pretrained("me/vit").source == "me/vit"


def test_an_upload_that_is_refused_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: object, **options: object) -> None:
        raise huggingface_hub.errors.LocalTokenNotFoundError("no token\nread the manual")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(InputError, match=r"me/vit: cannot upload \(no token\); check the name and: hf auth login"):
        model_of({}).push_to_hub("me/vit")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"push_to_hub needs huggingface_hub; .*'vitreg-core\[hub\]'"):
        model_of({}).push_to_hub("me/vit")


def test_torch_hub_finds_every_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = torch.hub.load(str(ROOT), "vit_ti32_reg4", source="local", depth=1, embed_dim=24)
    assert (model.config.registers, model.config.depth) == (4, 1)
    save_model(model, tmp_path)
    assert torch.hub.load(str(ROOT), "load_model", str(tmp_path), source="local").config == model.config


def test_timm_configs_leave_the_classes_to_transformers(tmp_path: Path) -> None:
    save_model(model_of({"num_classes": 5}), tmp_path, layout="timm")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_classes"] == len(load_file(tmp_path / "model.safetensors")["head.bias"]) == 5
    assert "num_classes" not in config["model_args"]
