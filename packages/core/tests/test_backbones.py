from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
import transformers as hf
from open_clip.transformer import VisionTransformer as OpenClipVision
from torch import nn
from vitreg_core import Backbone, InputError, PreprocessConfig, VisionTransformer, ViTConfig, as_backbone, capture
from vitreg_core.capturing import PARTS
from vitreg_core.outliers import find_outliers, patch_norms

DIM, DEPTH, HEADS, PATCH, SIZE = 16, 3, 2, 8, 32
TIMM = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}
HF = {
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 24,
    "patch_size": PATCH,
    "image_size": SIZE,
    "attn_implementation": "eager",
}
DINOV3 = {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True}
CLIP = {"image_size": SIZE, "patch_size": PATCH, "width": DIM, "layers": DEPTH, "heads": HEADS, "mlp_ratio": 2.0}


def timm_vit(**options: object) -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(**TIMM, **options)


def timm_eva(**options: object) -> nn.Module:
    return timm.models.eva.Eva(**TIMM, **options)


def clip_vision() -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(**HF, projection_dim=8)


def clip_model() -> nn.Module:
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    config = hf.CLIPConfig(vision_config=clip_vision().to_dict(), text_config=text, projection_dim=8)
    return hf.CLIPModel._from_config(config, attn_implementation="eager")


def open_clip_model() -> nn.Module:
    vision = {"image_size": SIZE, "patch_size": PATCH, "width": DIM, "layers": DEPTH, "head_width": DIM // HEADS}
    text = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
    return open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)


TIMM_MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm_vit,
    "timm reg": lambda: timm_vit(reg_tokens=3, no_embed_class=True, init_values=0.1, dynamic_img_size=True),
    "timm qk-norm avg": lambda: timm_vit(qk_norm=True, class_token=False, global_pool="avg"),
    "timm clip": lambda: timm_vit(pre_norm=True),
    "timm dinov3": lambda: timm_eva(num_reg_tokens=4, no_embed_class=True, dynamic_img_size=True, **DINOV3),
    "timm eva02": lambda: timm_eva(use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True),
    "timm grouped": lambda: timm_eva(use_rot_pos_emb=True, qkv_fused=False, attn_type="rope", num_kv_heads=1),
    "timm eva mixed": lambda: timm_eva(use_rot_pos_emb=True, rope_type="mixed", attn_type="rope", global_pool="token"),
}
HF_MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViTModel": lambda: hf.ViTModel(hf.ViTConfig(**HF)),
    "ViTForImageClassification": lambda: hf.ViTForImageClassification(hf.ViTConfig(**HF)),
    "Dinov2Model": lambda: hf.Dinov2Model(hf.Dinov2Config(**HF)),
    "Dinov2 SwiGLU": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**HF, use_swiglu_ffn=True)),
    "Dinov2WithRegisters": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**HF, num_register_tokens=3)
    ),
    "Dinov2WithRegistersForImageClassification": lambda: hf.Dinov2WithRegistersForImageClassification(
        hf.Dinov2WithRegistersConfig(**HF, num_register_tokens=2)
    ),
    "DINOv3ViTModel": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**HF, num_register_tokens=4)),
    "DINOv3 gated": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**HF, num_register_tokens=4, use_gated_mlp=True)),
    "CLIPVisionModel": lambda: hf.CLIPVisionModel(clip_vision()),
    "CLIPVisionModelWithProjection": lambda: hf.CLIPVisionModelWithProjection(clip_vision()),
    "CLIPModel": clip_model,
}
OPEN_CLIP_MODELS: dict[str, Callable[[], nn.Module]] = {
    "open_clip tower": lambda: OpenClipVision(**CLIP),
    "open_clip qk-norm": lambda: OpenClipVision(**CLIP, qk_norm=True, scale_fc=True),
    "open_clip CLIP": open_clip_model,
}
MODELS = TIMM_MODELS | HF_MODELS | OPEN_CLIP_MODELS
PREFIX = {  # class tokens, registers; (1, 0) where not named
    "timm reg": (1, 3),
    "timm qk-norm avg": (0, 0),
    "timm dinov3": (1, 4),
    "Dinov2WithRegisters": (1, 3),
    "Dinov2WithRegistersForImageClassification": (1, 2),
    "DINOv3ViTModel": (1, 4),
    "DINOv3 gated": (1, 4),
}


def build(name: str) -> nn.Module:
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE)


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_tokens_equal_those_of_timm(name: str, images: torch.Tensor) -> None:
    model = build(name)
    backbone = as_backbone(model)
    theirs, layers = model.forward_intermediates(images, [0, 1, 2], return_prefix_tokens=True, output_fmt="NLC")
    assert_close(backbone.features(images).tokens, theirs)
    for layer, their_layer in enumerate(layers):
        patches, prefix = their_layer if isinstance(their_layer, tuple) else (their_layer, their_layer[:, :0])
        ours = backbone.intermediate(images, [layer], norm=False)[0]
        assert_close(ours.tokens, torch.cat([prefix, patches], dim=1))
        assert_close(backbone.intermediate(images, [layer])[0].patches, model.norm(patches))
    embedded = model.patch_embed(images)
    assert_close(backbone.embeddings(images), embedded.flatten(1, -2))


@pytest.mark.parametrize("name", HF_MODELS)
def test_tokens_and_attention_equal_those_of_transformers(name: str, images: torch.Tensor) -> None:
    model = build(name)
    backbone = as_backbone(model)
    theirs = backbone.model(images, output_hidden_states=True, output_attentions=True)
    ours = backbone.features(images)
    if "CLIP" in name:  # which norms the class token alone
        assert_close(ours.cls, theirs.pooler_output)
        assert_close(ours.patches, backbone.model.post_layernorm(theirs.last_hidden_state[:, 1:]))
    else:
        assert_close(ours.tokens, theirs.last_hidden_state)
    with capture(backbone, parts=("before", "after", "attention")) as captured:
        backbone(images)
    for layer in range(DEPTH):
        assert_close(captured.before[layer], theirs.hidden_states[layer])
        assert_close(captured.after[layer], theirs.hidden_states[layer + 1])
        assert_close(captured.attention[layer], theirs.attentions[layer])
        assert_close(backbone.attention(images, layer), theirs.attentions[layer])


@pytest.mark.parametrize("name", OPEN_CLIP_MODELS)
def test_tokens_equal_those_of_open_clip(name: str, images: torch.Tensor) -> None:
    model = build(name)
    backbone = as_backbone(model)
    for norm in (True, False):
        theirs = backbone.model.forward_intermediates(
            images, output_fmt="NLC", output_extra_tokens=True, normalize_intermediates=norm
        )
        for layer, ours in enumerate(backbone.intermediate(images, range(DEPTH), norm=norm)):
            assert_close(ours.patches, theirs["image_intermediates"][layer])
            assert_close(ours.cls, theirs["image_intermediates_prefix"][layer][:, 0])
    pooled = model.encode_image(images) if isinstance(model, open_clip.CLIP) else model(images)
    assert_close(backbone.features(images).cls @ backbone.model.proj, pooled)


@pytest.mark.parametrize("name", MODELS)
def test_weights_values_and_hidden_units_give_what_the_block_writes(name: str, images: torch.Tensor) -> None:
    model = build(name)
    if isinstance(model, hf.PreTrainedModel):
        model.set_attn_implementation("sdpa")  # which keeps no weights
    backbone = as_backbone(model)
    block = backbone.blocks[1]
    attention = next(getattr(block, name) for name in ("attn", "attention", "self_attn") if hasattr(block, name))
    last = next(getattr(block.mlp, name) for name in ("fc2", "down_proj", "c_proj") if hasattr(block.mlp, name))
    mixed, written = [], []
    handles = [
        attention.register_forward_hook(lambda _module, _args, output: mixed.append(output)),
        block.mlp.register_forward_hook(lambda _module, _args, output: written.append(output)),
    ]
    with capture(model, 1, PARTS) as captured:
        run(model, images)
    for handle in handles:
        handle.remove()
    weights = captured.attention[1]
    assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    read = (weights @ captured.values[1]).transpose(1, 2).flatten(2)
    projection = next(getattr(attention, n) for n in ("proj", "o_proj", "out_proj") if hasattr(attention, n))
    read = attention.norm(read) if hasattr(attention, "norm") else read
    read = attention.ln_inner(read) if hasattr(attention, "ln_inner") else read
    assert_close(projection(read), mixed[0][0] if isinstance(mixed[0], tuple) else mixed[0])
    assert_close(last(captured.hidden[1]), written[0])
    assert_close(backbone.hidden(images, 1), captured.hidden[1])
    assert_close(backbone.attention(images, -2), weights)
    qkv = backbone.qkv(images, 1)
    for ours, part in ((qkv.queries, captured.queries), (qkv.keys, captured.keys), (qkv.values, captured.values)):
        assert_close(ours, part[1])


def run(model: nn.Module, images: torch.Tensor) -> None:
    if isinstance(model, hf.CLIPModel):
        model.get_image_features(images)
    elif isinstance(model, open_clip.CLIP):
        model.encode_image(images)
    else:
        model(images)


@pytest.mark.parametrize("name", MODELS)
def test_a_wrapped_model_is_a_backbone(name: str, images: torch.Tensor) -> None:
    backbone = as_backbone(build(name))
    assert isinstance(backbone, Backbone)
    assert (backbone.patch_size, backbone.embed_dim, backbone.depth, backbone.num_heads) == (PATCH, DIM, DEPTH, HEADS)
    classes, registers = PREFIX.get(name, (1, 0))
    assert backbone.prefix == ("cls",) * classes + ("register",) * registers
    assert (backbone.num_registers, backbone.num_prefix_tokens) == (registers, classes + registers)
    features = backbone.features(images)
    assert features.grid == (4, 4)
    assert (features.cls is not None) == bool(classes)
    assert features.registers.shape == (2, registers, DIM)
    assert backbone.embeddings(images).shape == features.patches.shape == (2, 16, DIM)
    assert backbone.device == torch.device("cpu")
    norms = patch_norms(backbone, images)
    assert norms.shape == (DEPTH, 2, 16)
    assert find_outliers(norms[-1]).mask.shape == (2, 16)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())


@pytest.mark.parametrize("name", ["timm reg", "timm dinov3", *HF_MODELS])
def test_other_sizes_are_left_to_the_library(name: str) -> None:
    model = build(name)
    backbone = as_backbone(model)
    images = torch.randn(1, 3, 4 * PATCH + 5, 6 * PATCH + 3)
    whole = images[:, :, : 4 * PATCH, : 6 * PATCH]
    ours = backbone.features(images)
    assert ours.grid == (4, 6)
    if name.startswith("timm"):
        theirs = model.forward_features(whole)
    else:
        told = {"interpolate_pos_encoding": True} if name.startswith(("ViT", "CLIP")) else {}
        theirs = backbone.model(whole, **told).last_hidden_state
        theirs = backbone.model.post_layernorm(theirs) if "CLIP" in name else theirs
    assert_close(ours.tokens, theirs)


def test_sizes_that_a_library_refuses() -> None:
    images = torch.randn(1, 3, 32, 48)
    backbone = as_backbone(build("timm"))
    with pytest.raises(InputError, match=r"images of 32x48.*model of 32x32.*dynamic_img_size=True") as refusal:
        backbone.features(images)
    assert "set_input_size((32, 48))" in str(refusal.value)
    backbone.model.set_input_size((32, 48))
    assert backbone.features(images).grid == (4, 6)
    with pytest.raises(InputError, match="does not resize its positions; resize the images"):
        as_backbone(build("open_clip tower")).features(images)
    with pytest.raises(InputError, match="image of 4x48 pixels is smaller than one patch of 8; give larger images"):
        as_backbone(build("timm")).features(images[:, :, :4])


def test_bfloat16_weights_and_autocast(images: torch.Tensor) -> None:
    for name in ("timm dinov3", "DINOv3ViTModel", "open_clip tower"):
        exact = as_backbone(build(name))
        weights = exact.attention(images, 0)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(exact.attention(images, 0).float(), weights, atol=0.1, rtol=0)
        low = as_backbone(exact.model.to(torch.bfloat16))
        assert low.features(images).patches.dtype == torch.bfloat16
        torch.testing.assert_close(low.attention(images, 0).float(), weights, atol=0.1, rtol=0)


def test_gradients_flow_through_features(images: torch.Tensor) -> None:
    model = build("DINOv3ViTModel")
    as_backbone(model).features(images).tokens.square().sum().backward()
    ours = model.model.layer[0].attention.q_proj.weight.grad.clone()
    model.zero_grad()
    model(images).last_hidden_state.square().sum().backward()
    torch.testing.assert_close(ours, model.model.layer[0].attention.q_proj.weight.grad)


def test_what_a_model_lacks_is_named(images: torch.Tensor) -> None:
    model = build("timm")
    backbone = as_backbone(model)
    model.blocks[1].mlp = nn.Identity()
    assert backbone.features(images).grid == (4, 4)
    with pytest.raises(InputError, match=r"Block has no mlp.fc2, so its hidden units cannot be read; ask for other"):
        backbone.hidden(images, 1)
    with pytest.raises(InputError, match="ParallelScalingBlock has no attn that tells its number of heads"):
        as_backbone(timm_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock))
    different = as_backbone(timm_vit(attn_layer="diff").eval())
    assert different.features(images).grid == (4, 4)
    with pytest.raises(InputError, match="of timm's DiffAttention are not known"):
        different.attention(images, 0)
    pooling = as_backbone(OpenClipVision(**CLIP, attentional_pool=True, attn_pooler_heads=2, output_dim=8).eval())
    assert pooling.intermediate(images, [0], norm=False)[0].grid == (4, 4)
    with pytest.raises(InputError, match="attentional pooling has no final norm of tokens; use norm=False"):
        pooling.features(images)
    with pytest.raises(InputError, match=r"scaled cosines .* ask for other parts"):
        cosine = OpenClipVision(**CLIP, scaled_cosine_attn=True).eval()
        as_backbone(cosine).attention(images, 0)


def test_masked_attention_is_refused(images: torch.Tensor) -> None:
    model = build("timm")
    refusal = pytest.raises(InputError, match=r"attention with attn_mask is not captured; run the model .* without it")
    with refusal, capture(model, 0, "attention"):
        model(images, attn_mask=torch.zeros(17, 17))


def test_unsupported_models_are_named(images: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"torch.nn.modules.linear.Linear is not supp.*timm: VisionTransformer, Eva"):
        as_backbone(nn.Linear(2, 2))
    opaque = SimpleNamespace(**{name: 1 for name in dir(Backbone) if not name.startswith("_")})
    with (
        pytest.raises(InputError, match=r"SimpleNamespace is no torch module, so nothing .* captured"),
        capture(opaque),
    ):
        pass
    with pytest.raises(InputError, match="is compiled"):
        as_backbone(torch.compile(build("timm")))
    distilled = timm.models.deit.VisionTransformerDistilled(**TIMM)
    with pytest.raises(InputError, match="has 2 prefix tokens, but only 1 are a class token or registers"):
        as_backbone(distilled)
    dropping = as_backbone(timm_vit(patch_drop_rate=0.5).train())
    with pytest.raises(InputError, match="gave 9 tokens for 17; put it into evaluation mode"):
        dropping.features(images)
    with pytest.raises(InputError, match=r"patches of \(8, 16\) pixels are not square"):
        as_backbone(timm.models.vision_transformer.VisionTransformer(**TIMM | {"patch_size": (8, 16)}))


def test_our_own_model_comes_back() -> None:
    model = VisionTransformer(ViTConfig(embed_dim=24, depth=1, num_heads=3))
    assert as_backbone(model) is model
    wrapped = as_backbone(build("timm"))
    assert as_backbone(wrapped) is wrapped
    with pytest.raises(InputError, match=r"has its own preprocessing; call as_backbone\(model\) without one"):
        as_backbone(model, PreprocessConfig())


def test_preprocessing_is_the_models_own_or_asked_for() -> None:
    named = timm.create_model("vit_tiny_patch16_224.augreg_in21k", img_size=64, depth=1, embed_dim=12)
    assert as_backbone(named).preprocess.config == PreprocessConfig(
        image_size=64, crop_ratio=0.9, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    tower = build("open_clip tower")
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    tower.preprocess_cfg = asdict(open_clip.transform.PreprocessCfg(size=SIZE, mean=mean, std=std))
    expected = PreprocessConfig(image_size=SIZE, mean=mean, std=std)
    assert as_backbone(tower).preprocess.config == expected
    assert as_backbone(build("ViTModel"), expected).preprocess.config == expected
    tower.preprocess_cfg["resize_mode"] = "squash"
    for unknown in (tower, build("timm"), build("ViTModel")):
        backbone = as_backbone(unknown)
        with pytest.raises(InputError, match=r"give as_backbone\(model, preprocess=PreprocessConfig"):
            backbone.preprocess.normalize(torch.rand(3, 4, 4))
