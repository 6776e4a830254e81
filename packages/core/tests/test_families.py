"""Every published family against its own library: the table test.

Models are small here. Real sizes at full depth (S, B, L, H and g; minutes, and 9 GB of memory):
`VITREG_FULL_DEPTH=1 OMP_NUM_THREADS=1 uv run pytest packages/core/tests/test_families.py -k full_depth -s`
"""

import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from vitreg_core import VisionTransformer, load_model, save_model
from vitreg_core.errors import InputError
from vitreg_core.weights import timm as timm_reader
from vitreg_core.weights.checkpoint import Checkpoint
from vitreg_core.weights.files import weights_hash

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path
import references as ref

Build = Callable[[Path], ref.Reference]

FAMILIES: dict[str, Build] = {
    "timm augreg": ref.from_timm("vit_small_patch16_224"),
    "timm dinov2": ref.from_timm("vit_small_patch14_dinov2"),
    "timm reg4_dinov2": ref.from_timm("vit_small_patch14_reg4_dinov2"),
    "timm reg4_dinov2 g": ref.from_timm("vit_giant_patch14_reg4_dinov2"),
    "timm clip": ref.from_timm("vit_base_patch16_clip_224"),
    "timm clip quickgelu": ref.from_timm("vit_base_patch16_clip_quickgelu_224"),
    "timm deit3": ref.from_timm("deit3_small_patch16_224"),
    "timm sbb": ref.from_timm("vit_wee_patch16_reg1_gap_256"),
    "timm gap": ref.from_timm("vit_medium_patch16_gap_256"),
    "timm positions for registers": ref.from_timm("vit_small_patch16_224", reg_tokens=4),
    "timm qk norm": ref.from_timm("vit_small_patch16_224", qk_norm=True),
    "timm dinov3": ref.from_timm("vit_small_patch16_dinov3", num_classes=0),
    "timm dinov3 qkvb": ref.from_timm("vit_small_patch16_dinov3_qkvb", num_classes=0),
    "timm dinov3 plus": ref.from_timm("vit_small_plus_patch16_dinov3_qkvb", num_classes=0),
    "dino": ref.official("vit_small_patch16_224", "offset", ref.save, num_classes=0),
    "dino checkpoint": ref.official("vit_small_patch16_224", "offset", ref.dino_checkpoint, num_classes=0),
    "dinov2": ref.official("vit_small_patch14_dinov2", "offset", ref.with_mask),
    "dinov2 reg4": ref.official(
        "vit_small_patch14_reg4_dinov2", "antialias", ref.with_class_row, {"reg_token": "register_tokens"}
    ),
    "dinov2 g": ref.official("vit_giant_patch14_dinov2", "offset", ref.with_mask, ref.SWIGLU),
    "dinov2 checkpoint": ref.official("vit_small_patch14_dinov2", "offset", ref.dinov2_checkpoint),
    "dinov3": ref.dinov3("vit_small_patch16_dinov3_qkvb"),
    "dinov3 plus": ref.dinov3("vit_small_plus_patch16_dinov3_qkvb", **{"local_cls_norm.weight": torch.ones(96)}),
    "deit3": ref.official("deit3_small_patch16_224", "size", ref.under_model, ref.DEIT3),
    "deit3 reg4": ref.official("deit3_small_patch16_224", "size", ref.under_model, ref.DEIT3, reg_tokens=4),
    "mae": ref.official("vit_base_patch16_224", "size", ref.under_model, change=ref.zero_class_position, num_classes=0),
    "mae autoencoder": ref.official(
        "vit_base_patch16_224", "size", ref.autoencoder, change=ref.zero_class_position, num_classes=0
    ),
    "mae fine-tuned": ref.official("vit_base_patch16_224", "size", ref.under_model, global_pool="avg"),
    "open_clip": ref.from_open_clip(),
    "open_clip quick gelu": ref.from_open_clip(quick_gelu=True),
    "open_clip custom text": ref.from_open_clip(custom_text=True),
    "open_clip tower": ref.from_open_clip(bare=True),
    "open_clip timm": ref.from_trunk,
}
for new in (False, True):
    names = f"transformers {5 if new else 4}"
    FAMILIES |= {
        f"{names} ViT": ref.from_transformers("ViTModel", ref.sizes(hf.ViTConfig), new_names=new),
        f"{names} ViT classifier": ref.from_transformers(
            "ViTForImageClassification", ref.sizes(hf.ViTConfig), new_names=new, tower=lambda model: model.vit
        ),
        f"{names} Dinov2": ref.from_transformers("Dinov2Model", ref.sizes(hf.Dinov2Config), new_names=new),
        f"{names} Dinov2 g": ref.from_transformers(
            "Dinov2Model", ref.sizes(hf.Dinov2Config, use_swiglu_ffn=True), new_names=new
        ),
        f"{names} Dinov2WithRegisters": ref.from_transformers(
            "Dinov2WithRegistersModel", ref.sizes(hf.Dinov2WithRegistersConfig), new_names=new
        ),
        f"{names} DINOv3ViT": ref.from_transformers(
            "DINOv3ViTModel", ref.sizes(hf.DINOv3ViTConfig, num_register_tokens=4), new_names=new
        ),
        f"{names} DINOv3ViT plus": ref.from_transformers(
            "DINOv3ViTModel",
            ref.sizes(hf.DINOv3ViTConfig, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"),
            new_names=new,
        ),
        f"{names} CLIPVision": ref.from_transformers("CLIPVisionModel", ref.sizes(hf.CLIPVisionConfig), new_names=new),
        f"{names} CLIPVision projected": ref.from_transformers(
            "CLIPVisionModelWithProjection",
            ref.sizes(hf.CLIPVisionConfig, projection_dim=10),
            new_names=new,
            tower=lambda model: model.vision_model,
        ),
        f"{names} CLIP": ref.from_transformers(
            "CLIPModel", ref.clip_config, new_names=new, tower=lambda model: model.vision_model
        ),
    }


def sizes_of(reference: ref.Reference) -> list[tuple[int, int]]:
    """Native, 224 px, not square, and one that the patch does not divide where the peer allows it."""
    patch = reference.patch
    if reference.native_only:
        return [reference.size]
    odd = [(5 * patch + 3, 7 * patch + patch - 1)] if reference.any_size else []
    return [reference.size, (224, 224), (6 * patch, 9 * patch), *odd]


def assert_equal(ours: VisionTransformer, reference: ref.Reference, size: tuple[int, int], atol: float) -> float:
    """Compare all that a peer shows; returns the largest difference of its tokens."""
    images = torch.randn(1, 3, *size)
    seen = reference.run(images)
    tokens = ours(images).tokens
    layers = range(ours.depth)
    torch.testing.assert_close(tokens, seen.tokens, rtol=0, atol=atol)
    for raw, theirs in zip(ours.intermediate(images, layers, norm=False), seen.stream, strict=True):
        torch.testing.assert_close(raw.tokens, theirs, rtol=1e-5, atol=atol)
    for normed, theirs in zip(ours.intermediate(images, layers), seen.stream, strict=True):
        torch.testing.assert_close(normed.tokens, ours.norm(theirs), rtol=0, atol=atol)
    for layer, theirs in zip(layers, seen.attention, strict=True):
        torch.testing.assert_close(ours.attention(images, layer), theirs, rtol=0, atol=atol)
    return (tokens - seen.tokens).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_gives_the_numbers_of_its_library(tmp_path: Path, family: str) -> None:
    reference = FAMILIES[family](tmp_path)
    ours = load_model(reference.path)
    assert (ours.config.size, ours.patch_size) == (reference.size, reference.patch)
    for size in sizes_of(reference):
        assert_equal(ours, reference, size, 1e-5)
    if reference.logits is not None:
        images = torch.randn(2, 3, *reference.size)
        torch.testing.assert_close(ours.classify(images), reference.logits(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["timm augreg", "dinov2 reg4", "dinov3 plus", "open_clip", "transformers 4 CLIP"])
def test_a_loaded_model_is_saved_and_comes_back_bit_for_bit(tmp_path: Path, family: str) -> None:
    ours = load_model(FAMILIES[family](tmp_path).path)
    save_model(ours, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert (again.config, again.preprocess.config) == (ours.config, ours.preprocess.config)
    assert weights_hash(again) == weights_hash(ours)


REAL = [
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_clip_224",
    "vit_large_patch14_reg4_dinov2",
    "deit3_huge_patch14_224",
    "vit_giant_patch14_reg4_dinov2",
]


@pytest.mark.skipif(os.environ.get("VITREG_FULL_DEPTH") != "1", reason="minutes; set VITREG_FULL_DEPTH=1")
@pytest.mark.parametrize("name", REAL)
@torch.no_grad()
def test_real_sizes_at_full_depth(tmp_path: Path, name: str) -> None:
    reference = ref.from_timm_full(name)(tmp_path)
    ours = load_model(reference.path)
    for size in ((224, 224), (8 * reference.patch, 11 * reference.patch)):
        print(name, size, assert_equal(ours, reference, size, 2e-5))  # noqa: T201 (asked for with -s)


def test_what_timm_builds_under_a_name_is_what_is_read() -> None:
    """All of timm's ViTs of one block, without values: accepted with the right settings, or refused."""
    accepted = 0
    for name in timm.list_models(["vit_*", "deit*"]):
        try:
            with torch.device("meta"):
                model = timm.create_model(name, depth=1)
        except (AssertionError, TypeError, RuntimeError):  # no plain stack of blocks
            continue
        cfg = {"input_size": list(model.default_cfg["input_size"])}
        config = {"architecture": name, "global_pool": model.global_pool, "pretrained_cfg": cfg}
        try:
            weights = timm_reader.read(Checkpoint(Path(name), model.state_dict(), config))
        except InputError:
            continue
        found, block = weights.config, model.blocks[0]
        with torch.device("meta"):
            expected = VisionTransformer(found).state_dict()
        if {n: t.shape for n, t in expected.items()} != {n: t.shape for n, t in weights.tensors.items()}:
            continue
        activation = {"GELU": "gelu", "QuickGELU": "quick_gelu", "SiLU": "gelu"}[type(block.mlp.act).__name__]
        settings = (activation, block.attn.num_heads, block.norm1.eps, model.patch_embed.img_size)
        assert (found.activation, found.num_heads, found.norm_eps, found.size) == settings, name
        assert type(block).__name__ in {"Block", "EvaBlock"}, name
        assert (getattr(model, "rope", None) is not None) == (found.position == "rope"), name
        assert found.pool == {"token": "cls", "avg": "avg"}[model.global_pool], name
        accepted += 1
    assert accepted > 100


def edited(name: str, change: Callable[[ref.Tensors], object]) -> Callable[[Path], Path]:
    """The file of a family after a change of its tensors, without any config."""

    def build(folder: Path) -> Path:
        path = FAMILIES[name](folder).path
        tensors = load_file(path / "model.safetensors") if path.is_dir() else torch.load(path)
        change(tensors.get("model", tensors))
        torch.save(tensors, folder / "edited.pth")
        return folder / "edited.pth"

    return build


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "CLIP of timm": (edited("timm clip", len), 'give activation="gelu" or "quick_gelu", or the config.json with timm'),
    "CLIP": (edited("open_clip", len), 'give activation="gelu" or "quick_gelu", or its open_clip_config.json beside'),
    "CLIP without ln_pre": (
        edited("open_clip tower", lambda t: [t.pop(f"ln_pre.{kind}") for kind in ("weight", "bias")]),
        "how a tower without ln_pre pools; put its open_clip_config.json beside it",
    ),
    "transformers": (edited("transformers 4 ViT", len), "no num_attention_heads, .* put the config.json of the model"),
    "rotary of timm": (
        edited("timm dinov3", len),
        'only DINOv3 can be read; .* "architecture": "vit_..._dinov3"',
    ),
    "no class token": (edited("timm gap", len), 'write their "architecture" into the config.json'),
    "two norms": (
        edited("dinov3", lambda t: t.update({"cls_norm.weight": torch.ones(96)})),
        "tensor cls_norm.weight: this model norms its class token and its patches differently",
    ),
    "other periods": (
        edited("dinov3", lambda t: t.update({"rope_embed.periods": torch.ones(8)})),
        r"rope_embed.periods of shape \(8,\) is not 100 \*\* \(i / 8\), the only rotary embedding",
    ),
    "missing": (
        edited("deit3", lambda t: t.pop("blocks.1.gamma_2")),
        r"tensor blocks.1.gamma_2 of shape \(96,\) is missing; nothing was loaded",
    ),
    "missing query": (
        edited("dinov2", lambda t: t.pop("blocks.1.attn.qkv.weight")),
        r"tensor blocks.1.attn.qkv.weight of shape \(288, 96\) is missing",
    ),
    "misshapen": (
        edited("deit3", lambda t: t.update({"blocks.0.gamma_1": torch.ones(5)})),
        r"tensor blocks.0.gamma_1 has shape \(5,\), not \(96,\)",
    ),
    "unexpected": (
        edited("dinov2", lambda t: t.update({"blocks.0.attn.scale": torch.ones(5)})),
        r"unexpected tensor blocks.0.attn.scale of shape \(5,\)",
    ),
    "not a number": (
        edited("dino", lambda t: t["cls_token"].fill_(torch.nan)),
        "tensor cls_token holds values that are not finite",
    ),
    "unusual width": (
        edited("dino", lambda t: t.update({"patch_embed.proj.weight": torch.zeros(100, 3, 16, 16)})),
        "heads of a ViT of width 100 are not known; give num_heads=N",
    ),
    "not a ViT": (
        edited("dino", lambda t: [t.pop(name) for name in list(t) if "norm" in name]),
        r"are neither in our format .* nor in the names of DINO, .* give a ViT of one of these",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_or_told_is_named(tmp_path: Path, case: str) -> None:
    build, advice = REFUSED[case]
    path = build(tmp_path)
    with pytest.raises(InputError, match=advice) as error:
        load_model(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_the_activation_may_be_given(tmp_path: Path, activation: str) -> None:
    reference = FAMILIES["timm clip quickgelu" if activation == "quick_gelu" else "timm clip"](tmp_path)
    torch.save(load_file(reference.path / "model.safetensors"), tmp_path / "bare.pth")
    assert_equal(load_model(tmp_path / "bare.pth", activation=activation), reference, (112, 112), 1e-5)


@pytest.mark.parametrize(
    ("entry", "value", "advice"),
    [
        ("hidden_act", "gelu_new", "hidden_act='gelu_new' is not gelu or quick_gelu"),
        ("image_size", [1], r"image_size=\[1\] is not a size in pixels; mend it"),
    ],
)
def test_settings_of_transformers_that_cannot_be_followed_are_named(
    tmp_path: Path, entry: str, value: object, advice: str
) -> None:
    path = FAMILIES["transformers 4 ViT"](tmp_path).path
    config = json.loads((path / "config.json").read_text()) | {entry: value}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=advice):
        load_model(path)


def test_dinov2s_classifier_of_transformers_is_refused(tmp_path: Path) -> None:
    build = ref.from_transformers("Dinov2ForImageClassification", ref.sizes(hf.Dinov2Config))
    with pytest.raises(InputError, match=r"reads class token and patches side by side.*without a classifier"):
        load_model(build(tmp_path).path)


@pytest.mark.parametrize(
    ("entry", "value", "advice"),
    [
        ("vision_cfg", {"attentional_pool": True}, "attentional_pool=True is what no model here does"),
        ("vision_cfg", {"pool_type": "none"}, "pool_type='none' is not one of tok, avg; mend it"),
        ("vision_cfg", 3, "vision_cfg=3 is not an object; mend or remove it"),
    ],
)
def test_settings_of_open_clip_that_cannot_be_followed_are_named(
    tmp_path: Path, entry: str, value: object, advice: str
) -> None:
    path = FAMILIES["open_clip"](tmp_path).path
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {entry: value}}))
    with pytest.raises(InputError, match=advice):
        load_model(path)


PROCESSORS = {
    "ViT": (hf.ViTImageProcessorPil(size={"height": 56, "width": 56}), "ViT"),
    "DINOv2": (
        hf.BitImageProcessorPil(
            size={"shortest_edge": 74}, crop_size={"height": 56, "width": 56}, image_mean=[0.4] * 3, resample=3
        ),
        "Dinov2",
    ),
    "CLIP": (hf.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), "CLIP"),
    "not normalised": (hf.ViTImageProcessorPil(size={"height": 56, "width": 56}, do_normalize=False), "ViT"),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(90, 61), (75, 120), (56, 56), (101, 72)])
def test_images_are_prepared_as_the_processor_beside_the_weights_does(
    tmp_path: Path, name: str, size: tuple[int, int]
) -> None:
    processor, family = PROCESSORS[name]
    path = FAMILIES[f"transformers 4 {family}"](tmp_path).path
    processor.save_pretrained(path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    torch.testing.assert_close(load_model(path).preprocess(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["CLIP", "Bit", "ViT"])
def test_a_mere_number_is_the_side_that_the_processor_of_that_kind_means(tmp_path: Path, kind: str) -> None:
    path = FAMILIES["transformers 4 CLIP"](tmp_path).path
    theirs = {"feature_extractor_type": f"{kind}FeatureExtractor", "size": 56, "do_center_crop": kind != "ViT"}
    (path / "preprocessor_config.json").write_text(json.dumps(theirs | {"crop_size": 56}))
    processor = getattr(hf, f"{kind}ImageProcessorPil").from_pretrained(path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 97, 3), dtype=np.uint8))
    expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    found = load_model(path).preprocess
    assert found.config.resize == ("squash" if kind == "ViT" else "shorter")
    assert found(image).shape == expected.shape


def test_clip_without_a_processor_gets_the_pixels_of_clip(tmp_path: Path) -> None:
    config = load_model(FAMILIES["transformers 4 CLIP"](tmp_path).path).preprocess.config
    processor = hf.CLIPImageProcessorPil()
    assert (config.mean, config.std) == (tuple(processor.image_mean), tuple(processor.image_std))


def test_look_alikes_of_deit3_in_timm_are_refused(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_small_patch16_rope_ape_224", depth=1)
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    with pytest.raises(InputError, match="has other blocks than a plain ViT, and cannot be read"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"act_layer": "relu"}, "activation='relu'"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"norm_layer": "rmsnorm"}, "model_args norm_layer='rmsnorm' cannot be followed"),
    ],
)
def test_arguments_of_timm_that_cannot_be_followed_are_named(tmp_path: Path, arguments: dict, advice: str) -> None:
    path = FAMILIES["timm augreg"](tmp_path).path
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_args": arguments}))
    with pytest.raises(InputError, match=advice):
        load_model(path)


def test_the_activation_among_the_arguments_of_timm_is_followed(tmp_path: Path) -> None:
    path = FAMILIES["timm augreg"](tmp_path).path
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_args": {"act_layer": "quick_gelu"}}))
    assert load_model(path).config.activation == "quick_gelu"


def test_no_registers_of_transformers_are_none(tmp_path: Path) -> None:
    shape = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "num_register_tokens": 0}
    theirs = hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**shape)).eval()
    theirs.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    found = load_model(tmp_path)
    assert found.num_registers == 0
    torch.testing.assert_close(found(images).tokens, theirs(images).last_hidden_state, rtol=0, atol=1e-5)


def test_weights_of_a_compiled_model_are_read(tmp_path: Path) -> None:
    path = edited("deit3", lambda t: [t.update({f"_orig_mod.{name}": t.pop(name)}) for name in list(t)])(tmp_path)
    assert load_model(path).depth == 2


@pytest.mark.parametrize(
    "entry", [{"size": {"longest_edge": 3}}, {"resample": 1}, {"do_rescale": False}, {"rescale_factor": 1.0}]
)
def test_processors_that_cannot_be_followed_are_named(tmp_path: Path, entry: dict) -> None:
    path = FAMILIES["transformers 4 ViT"](tmp_path).path
    (path / "preprocessor_config.json").write_text(json.dumps(entry))
    with pytest.raises(InputError, match=r"preprocessor_config.json: \w+=.*mend it"):
        load_model(path)


def test_official_checkpoints_are_evaluated_as_their_authors_do(tmp_path: Path) -> None:
    for name in ("dino", "dinov2 reg4", "mae"):
        (tmp_path / name).mkdir()
        config = load_model(FAMILIES[name](tmp_path / name).path).preprocess.config
        assert (config.image_size, config.crop_ratio) == (224, 0.875)
    config = load_model(FAMILIES["deit3"](tmp_path).path).preprocess.config
    assert (config.image_size, config.crop_ratio) == (112, 1.0)


def test_dinov2s_golden_values_come_from_a_file_of_its_names(tmp_path: Path) -> None:
    """Values of the official code for parameters that follow a formula, which its names in alphabetical order fix."""

    def sine(shape: tuple[int, ...], phase: float, scale: float) -> torch.Tensor:
        steps = torch.arange(math.prod(shape), dtype=torch.float64)
        return (scale * torch.sin(0.7 * steps + phase)).float().reshape(shape)

    model = timm.create_model("vit_small_patch14_reg4_dinov2")
    shapes = {name.replace("reg_token", "register_tokens"): tuple(t.shape) for name, t in model.state_dict().items()}
    shapes |= {"pos_embed": (1, 1370, 384), "mask_token": (1, 384)}
    tensors = {}
    for phase, name in enumerate(sorted(shapes)):
        norm, scale = re.search(r"norm\d?\.weight$", name), "gamma" in name
        tensors[name] = 0.5 * scale + bool(norm) + sine(shapes[name], phase, 0.1 if norm or scale else 0.05)
    torch.save(tensors, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    with torch.no_grad():
        features = load_model(tmp_path / "dinov2_vits14_reg4_pretrain.pth")(sine((1, 3, 224, 280), 3, 1))
    assert features.cls is not None
    found = torch.cat([features.cls[0, :4], features.patches[0, 7, :2], features.registers[0, 0, :2]])
    expected = [-1.50377, -0.40949, 0.22427, 0.25083, -1.50752, -0.53801, -1.44496, -0.37805]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)
    assert abs(features.patches.abs().mean().item() - 0.864944) < 1e-4
