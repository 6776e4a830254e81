"""The dual encoder against open_clip's own models, with copied weights; nothing is downloaded."""

from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from vitreg_core import load_model
from vitreg_core.clip import ClipConfig, DualEncoder, TextConfig, clip_vision
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_core.timm import register_open_clip
from vitreg_core.weights.clip import load_clip
from vitreg_core.weights.files import write_folder

TOKENS = torch.randint(1, 60, (3, 12), generator=torch.Generator().manual_seed(0))


def small(registers: int = 0, **changes: object) -> ClipConfig:
    """A dual encoder of milliseconds."""
    vision = clip_vision(
        image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=24, registers=registers, **changes
    )
    return ClipConfig(vision=vision, text=TextConfig(context_length=12, vocab_size=70, width=64, heads=2, layers=2))


def images(seed: int = 0, size: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(seed))


def their_model(*, quick_gelu: bool = False) -> CLIP:
    torch.manual_seed(1)
    vision = CLIPVisionCfg(layers=2, width=64, head_width=64, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=12, vocab_size=70, width=64, heads=2, layers=2)
    return CLIP(24, vision, text, quick_gelu=quick_gelu).eval()


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_model_of_open_clip_loads_with_equal_outputs(tmp_path: Path, quick_gelu: object) -> None:
    theirs = their_model(quick_gelu=bool(quick_gelu))
    config = {
        "model_cfg": {
            "embed_dim": 24,
            "quick_gelu": quick_gelu,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 64, "patch_size": 8},
            "text_cfg": {"context_length": 12, "vocab_size": 70, "width": 64, "heads": 2, "layers": 2},
        },
        "preprocess_cfg": {},
    }
    write_folder(theirs.state_dict(), config, tmp_path, ("open_clip_model.safetensors", "open_clip_config.json"))
    ours = load_clip(tmp_path)
    torch.testing.assert_close(ours.encode_image(images()), theirs.encode_image(images()), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode_text(TOKENS), theirs.encode_text(TOKENS), rtol=0, atol=1e-5)
    encoded = ours(images(), TOKENS)
    for mine, their in zip(encoded, theirs(images(), TOKENS)[:2], strict=True):
        torch.testing.assert_close(mine, their, rtol=0, atol=1e-6)
    assert ours.logit_scale.item() == theirs.logit_scale.item()


def test_vit_b_16_is_that_of_open_clip() -> None:
    with torch.device("meta"):
        theirs = open_clip.create_model("ViT-B-16", load_weights=False, device="meta")
        ours = DualEncoder(ClipConfig(vision=clip_vision()))
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs, ours.visual, theirs.visual)]
    assert counts == [149_620_737, 149_620_737, 86_192_640, 86_192_640]
    four = DualEncoder(override(ClipConfig(vision=clip_vision()), {"vision.registers": 4})).visual
    assert sum(p.numel() for p in four.parameters()) == 86_195_712


@pytest.mark.parametrize("registers", [0, 4])
def test_a_saved_model_opens_in_open_clip_and_here(tmp_path: Path, registers: int) -> None:
    torch.manual_seed(0)
    model = DualEncoder(small(registers)).eval()
    model.export(tmp_path)
    if registers:
        assert register_open_clip(tmp_path).endswith("reg4")
        register_open_clip(tmp_path)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs = theirs.eval()
    ours = load_clip(tmp_path)
    for one in (ours, theirs):
        torch.testing.assert_close(one.encode_image(images()), model.encode_image(images()), rtol=0, atol=1e-5)
        torch.testing.assert_close(one.encode_text(TOKENS), model.encode_text(TOKENS), rtol=0, atol=1e-5)
        assert one.logit_scale.item() == model.logit_scale.item()
    assert transform.transforms[0].size in (32, (32, 32), [32, 32])
    tower = load_model(tmp_path)
    assert tower.config == model.visual.config
    torch.testing.assert_close(tower(images()).patches, model.visual(images()).patches)
    assert ours.visual.preprocess.config == model.visual.preprocess.config


def test_registers_stand_before_the_first_norm() -> None:
    torch.manual_seed(0)
    plain, four = DualEncoder(small()).eval(), DualEncoder(small(4)).eval()
    values = {name: value for name, value in four.state_dict().items() if "registers" not in name}
    plain.load_state_dict({**values, "visual.registers.tokens": torch.empty(0, 64)})
    embedded = four.visual.embed(images())
    torch.testing.assert_close(embedded[:, 5:], plain.visual.embed(images())[:, 1:])
    tokens = torch.nn.functional.layer_norm(
        four.visual.registers.tokens, (64,), four.visual.pre_norm.weight, four.visual.pre_norm.bias, 1e-5
    )
    torch.testing.assert_close(embedded[:, 1:5], tokens.expand(3, 4, 64))
    assert four.visual.registers.tokens.std().item() == pytest.approx(64**-0.5, rel=0.3)


def test_a_model_for_siglip_has_a_bias(tmp_path: Path) -> None:
    model = DualEncoder(override(small(), {"bias": True})).eval()
    assert (model.logit_scale.exp().item(), model.logit_bias.item()) == (pytest.approx(10.0), -10.0)
    model.export(tmp_path)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    assert theirs.logit_bias.item() == load_clip(tmp_path).logit_bias.item() == -10.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_norm": False}, "pre_norm=False cannot be written for open_clip, whose tower has True"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06 cannot be written for open_clip, whose tower has 1e-05"),
    ],
)
def test_what_open_clip_has_not_is_not_written(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DualEncoder(small(**changes)).export(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_bad_files_are_one_error(tmp_path: Path) -> None:
    model = DualEncoder(small())
    model.export(tmp_path)
    with pytest.raises(InputError, match="no text tower of open_clip in it; give a dual encoder"):
        tower = tmp_path / "tower"
        load_model(tmp_path)
        from vitreg_core import save_model

        save_model(model.visual, tower)
        load_clip(tower)
    with pytest.raises(InputError, match="num_classes=0: it is the width of the joint space"):
        DualEncoder(override(small(), {"vision.num_classes": 0}))
    with pytest.raises(InputError, match=r"text.width=64 does not divide by text.heads=5"):
        DualEncoder(override(small(), {"text.heads": 5}))
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match="names no image tower of vitreg"):
        register_open_clip(tmp_path / "plain")
