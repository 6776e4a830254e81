import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from safetensors.torch import save_file
from vitreg_core import VisionTransformer, ViTConfig, save_model
from vitreg_core.backbones.adapter import Adapter
from vitreg_core.errors import InputError
from vitreg_core.weights.files import weights_hash
from vitreg_eval import models
from vitreg_eval.cli import main
from vitreg_eval.models import open_model
from vitreg_eval.results import read_result

SIZE = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {
        "layers": 2,
        "width": 24,
        "head_width": 8,
        "patch_size": 8,
        "image_size": 32,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}
PIXELS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


@pytest.fixture
def timm() -> ModuleType:
    return pytest.importorskip("timm")


@pytest.fixture
def timm_folder(timm: ModuleType, tmp_path: Path) -> Path:
    """A timm model with attention pooling, which ours does not have."""
    torch.manual_seed(0)
    arguments = SIZE | {"global_pool": "map"}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": arguments}
    folder = tmp_path / "timm_model"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"input_size": [3, 32, 32]}}))
    return folder


def test_our_own_model_is_opened_as_load_model_does(tmp_path: Path) -> None:
    save_model(VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)), tmp_path)
    model = open_model(str(tmp_path))
    assert isinstance(model, VisionTransformer)
    assert model.source == str(tmp_path)
    assert open_model("vit_ti16").source == "vit_ti16 (random weights)"


def test_a_preset_has_the_same_random_weights_every_time() -> None:
    torch.manual_seed(5)
    first, state = open_model("vit_ti32"), torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())  # and leaves the caller's generator alone
    torch.manual_seed(6)
    assert weights_hash(open_model("vit_ti32")) == weights_hash(first)


def test_a_timm_model_that_ours_cannot_hold_runs_in_its_own_class(timm: ModuleType, timm_folder: Path) -> None:
    theirs = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    model = open_model(str(timm_folder))
    assert isinstance(model, Adapter)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.features(images).tokens, theirs.forward_features(images))
        assert model.features(torch.randn(1, 3, 48, 64)).grid == (6, 8)
    assert model.source == str(timm_folder)
    assert not any(module.training for module in model.model.modules())
    assert len(weights_hash(model)) == 64


def test_a_remote_source_keeps_its_name(timm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def locate(source: str) -> Path:
        asked.append(source)
        return timm_folder / "model.safetensors"

    monkeypatch.setattr(models, "locate", locate)
    model = open_model("timm:vit_tiny_patch16_224.some_tag")
    assert isinstance(model, Adapter)
    assert model.source == "timm:vit_tiny_patch16_224.some_tag"
    assert asked == ["timm:vit_tiny_patch16_224.some_tag"]


def test_a_transformers_model_that_ours_cannot_hold_runs_in_its_own_class(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        hidden_act="relu",
    )
    theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
    theirs.save_pretrained(tmp_path)
    processor = {"size": 32, "resample": 3, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = open_model(str(tmp_path))
    assert isinstance(model, Adapter)
    assert (model.preprocess.config.mean, model.preprocess.config.image_size) == ((0.1, 0.1, 0.1), 32)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.features(images).tokens, theirs(images).last_hidden_state)


def test_missing_tensors_of_a_transformers_model_are_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=32, patch_size=8, hidden_act="relu"
    )
    theirs = transformers.ViTModel(config, add_pooling_layer=False)
    theirs.save_pretrained(tmp_path)
    tensors = {name: value for name, value in theirs.state_dict().items() if name != "embeddings.cls_token"}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tensor embeddings\.cls_token is missing for a ViTModel; fetch it again"):
        open_model(str(tmp_path))


def test_an_open_clip_tower_that_ours_cannot_hold_runs_in_its_own_class(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.CLIP(CLIP["embed_dim"], CLIP["vision_cfg"], CLIP["text_cfg"]).eval()
    tensors = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": CLIP, "preprocess_cfg": PIXELS}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = open_model(str(tmp_path))
    assert isinstance(model, Adapter)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = (one.embeddings(images) for one in (model, models.as_backbone(theirs.visual)))
    torch.testing.assert_close(found, expected)


def test_tasks_measure_a_foreign_model(timm_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["norms", "--model", str(timm_folder), "--out", str(out), "--test_images", "8", "--device", "cpu"])
    found = read_result(out)
    assert found.model.source == str(timm_folder)
    assert found.model.hash == weights_hash(open_model(str(timm_folder)))


WRONG = {
    "registers": ("norms --registers 0,1 --test_images 8", "runs in the class of its own library; leave it out"),
    "head": ("classify --data {photos}", "only heads of vitreg's own models are read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_foreign_model_lacks_is_named(
    case: str, timm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, advice = WRONG[case]
    words = line.format(photos=tmp_path).split()
    with pytest.raises(SystemExit):
        main([*words, "--model", str(timm_folder), "--out", str(tmp_path / "out"), "--device", "cpu"])
    error = capsys.readouterr().err
    assert advice in error
    assert error.count("\n") == 1


def test_weights_that_no_library_describes_keep_our_reason(tmp_path: Path) -> None:
    save_file({"strange": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"its tensors .strange, "):
        open_model(str(tmp_path))
    with pytest.raises(InputError, match="model source 'nowhere': no such file or folder"):
        open_model("nowhere")


def test_weights_that_their_library_cannot_build_name_both_reasons(timm_folder: Path) -> None:
    config = json.loads((timm_folder / "config.json").read_text())
    (timm_folder / "config.json").write_text(json.dumps(config | {"architecture": "vit_unheard_of"}))
    with pytest.raises(InputError, match=r"attn_pool.*its own library cannot build it either .Unknown model"):
        open_model(str(timm_folder))
