import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from vitreg_core import PreprocessConfig, VisionTransformer, ViTConfig, load_model, save_model
from vitreg_core.data.images import list_images, read_image
from vitreg_core.errors import InputError
from vitreg_core.weights.files import weights_hash

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, registers=2, num_classes=5)
PREPROCESS = PreprocessConfig(image_size=32, crop_ratio=0.8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a small model of ours."""
    save_model(VisionTransformer(CONFIG, PREPROCESS), tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = VisionTransformer(CONFIG, PREPROCESS).eval()
    save_model(model, tmp_path / "model")
    for source in (tmp_path / "model", str(tmp_path / "model" / "model.safetensors")):
        loaded = load_model(source)
        assert (loaded.config, loaded.preprocess.config) == (CONFIG, PREPROCESS)
        assert weights_hash(loaded) == weights_hash(model)
        assert (loaded.source, loaded.training) == (str(source), False)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_the_hash_sees_every_value() -> None:
    model = VisionTransformer(CONFIG)
    before = weights_hash(model)
    with torch.no_grad():
        model.cls[0] += 1e-6
    assert weights_hash(model) != before


def test_a_preset_says_that_its_weights_are_random() -> None:
    assert load_model("vit_ti32_reg4").source == "vit_ti32_reg4 (random weights)"


def timm_folder(folder: Path, registers: int, name: str = "model.safetensors") -> torch.nn.Module:
    theirs = timm.models.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=192, depth=2, num_heads=3, num_classes=7, reg_tokens=registers
    )
    theirs = (
        theirs
        if registers == 0
        else timm.models.VisionTransformer(
            img_size=64,
            patch_size=16,
            embed_dim=192,
            depth=2,
            num_heads=3,
            num_classes=7,
            reg_tokens=registers,
            no_embed_class=True,
        )
    )
    folder.mkdir()
    if name.endswith(".bin"):
        torch.save({"state_dict": theirs.state_dict()}, folder / name)
    else:
        save_file(theirs.state_dict(), folder / name)
    settings = {"input_size": [3, 64, 64], "crop_pct": 0.875, "interpolation": "bilinear", "mean": [0.1] * 3}
    (folder / "config.json").write_text(json.dumps({"architecture": "vit", "pretrained_cfg": settings}))
    return theirs.eval()


@pytest.mark.parametrize(("registers", "name"), [(0, "model.safetensors"), (4, "pytorch_model.bin")])
@torch.no_grad()
def test_timm_folders_give_timms_numbers(tmp_path: Path, registers: int, name: str) -> None:
    theirs, ours = timm_folder(tmp_path / "timm", registers, name), load_model(tmp_path / "timm")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.classify(images), theirs(images), rtol=0, atol=1e-5)
    assert ours.config.class_position == (registers == 0)
    assert ours.preprocess.config == PreprocessConfig(
        image_size=64, crop_ratio=0.875, interpolation="bilinear", mean=(0.1, 0.1, 0.1)
    )


def test_heads_of_an_unusual_width_are_asked_for(tmp_path: Path) -> None:
    timm_folder(tmp_path / "timm", 0)
    tensors = dict(load_file(tmp_path / "timm" / "model.safetensors").items())
    tensors["patch_embed.proj.weight"] = torch.zeros(200, 3, 16, 16)
    save_file(tensors, tmp_path / "timm" / "model.safetensors")
    with pytest.raises(InputError, match=r'"model_args": \{"num_heads": N\} into the config.json'):
        load_model(tmp_path / "timm")


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("cls_token", torch.zeros(2, 192), r"cls_token has shape \(2, 192\), which no model of its family has"),
        ("pos_embed", torch.zeros(2, 17, 192), r"pos_embed has shape \(2, 17, 192\), which no"),
        (
            "pos_embed",
            torch.zeros(1, 19, 192),
            "no square grid with .*; write the image size it fits into",
        ),
        ("blocks.1.norm1.weight", torch.zeros(5), r"blocks.1.norm1.weight has shape \(5,\), not \(192,\)"),
        ("blocks.0.mlp.norm.weight", torch.zeros(192), r"unexpected tensor blocks.0.mlp.norm.weight of shape \(192,\)"),
        ("fc_norm.weight", torch.zeros(192), r"tensor fc_norm.bias of shape \(192,\) is missing"),
    ],
)
def test_misshapen_timm_tensors_are_named(tmp_path: Path, name: str, value: torch.Tensor, advice: str) -> None:
    timm_folder(tmp_path / "timm", 0)
    save_file(
        {**load_file(tmp_path / "timm" / "model.safetensors"), name: value}, tmp_path / "timm" / "model.safetensors"
    )
    with pytest.raises(InputError, match=advice):
        load_model(tmp_path / "timm")


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"pretrained_cfg": {"input_size": 64}}, r"input_size=64 is not \[3, height, width\]; mend it"),
        ({"pretrained_cfg": 3}, "pretrained_cfg=3 is not an object"),
        ({"pretrained_cfg": {"crop_pct": 7}}, "crop_ratio=7"),
        ({"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode='border' is not one of center, squash; mend it"),
        ({"model_args": {"img_size": "big"}}, "img_size='big' is not a size in pixels; mend it"),
        ({"global_pool": "map"}, r"global_pool='map'; only heads on .* \(\"token\", \"avg\"\) are read"),
    ],
)
def test_timm_configs_that_cannot_be_followed_are_named(tmp_path: Path, settings: dict, advice: str) -> None:
    timm_folder(tmp_path / "timm", 0)
    (tmp_path / "timm" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=advice):
        load_model(tmp_path / "timm")


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def pickled_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(), protocol=2))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (edit(lambda t: t.pop("norm.weight")), r"tensor norm.weight of shape \(24,\) is missing; nothing was"),
    "unexpected": (edit(lambda t: t.update(extra=torch.zeros(3))), r"unexpected tensor extra of shape \(3,\)"),
    "misshapen": (edit(lambda t: t.update(cls=torch.zeros(25))), r"tensor cls has shape \(25,\), not \(24,\)"),
    "nan": (edit(lambda t: t["cls"].fill_(torch.nan)), "tensor cls holds values that are not finite"),
    "integers": (edit(lambda t: t.update(cls=torch.zeros(24, dtype=torch.long))), "tensor cls holds values"),
    "truncated": (truncate, "not a readable weights file .*; fetch or write it again"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a readable weights file"),
    "code": (pickled_code, "not a readable weights file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors in it; give"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "config list": (lambda folder: (folder / "config.json").write_text("[]"), "holds a list, not an object"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        'in our format, but .*config.json with "library": "vitreg" is missing; put it there',
    ),
    "config field": (
        lambda folder: (folder / "config.json").write_text('{"library": "vitreg", "model": {"dept": 1}}'),
        "dept=1: unknown option; did you mean depth",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_in_one_line(
    saved: Path, damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    break_it, advice = DAMAGES[damage]
    break_it(saved)
    with pytest.raises(InputError, match=advice) as error:
        load_model(saved)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_unknown_sources_are_refused_with_advice() -> None:
    with pytest.raises(InputError, match="no such file or folder, and no preset or official name; give a folder"):
        load_model("somewhere/else")
    with pytest.raises(InputError, match="did you mean vit_s16_reg4"):
        load_model("vit_s16_regs4")


def test_a_changed_model_is_not_saved_as_if_it_were_not(tmp_path: Path) -> None:
    edited = VisionTransformer(CONFIG)
    edited.block(0).mlp.fc1 = torch.nn.Linear(CONFIG.embed_dim, 5)
    with pytest.raises(InputError, match="changed after it was built; save the one it was made from"):
        save_model(edited, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write the model .*; give another folder"):
        save_model(VisionTransformer(CONFIG), tmp_path / "file")


@pytest.mark.real_data
@torch.no_grad()
def test_the_sample_vit_equals_timm_on_photos(shared_data: Path) -> None:
    folder = shared_data / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    theirs = timm.create_model("vit_tiny_patch16_224").eval()
    theirs.load_state_dict(load_file(folder / "model.safetensors"))
    ours = load_model(folder)
    paths = list_images(shared_data / "imagenet-sample" / "val")[::63][:16]
    images = torch.stack([ours.preprocess(read_image(path)) for path in paths])
    assert len(images) == 16
    features = ours(images)
    assert features.cls is not None
    tokens = torch.cat([features.cls[:, None], features.patches], dim=1)
    assert (tokens - theirs.forward_features(images)).abs().max() < 1e-4


@pytest.mark.parametrize("there", [0, 2])
def test_registers_are_added_only_on_request_and_with_a_warning(tmp_path: Path, there: int) -> None:
    model = VisionTransformer(CONFIG.model_copy(update={"registers": there})).eval()
    save_model(model, tmp_path)
    with pytest.raises(InputError, match=f'has {there}; to add random ones, .* give new_registers="init" as well'):
        load_model(tmp_path, registers=5)
    with pytest.warns(UserWarning, match=f"{5 - there} registers added with random values.*train the model before use"):
        grown = load_model(tmp_path, registers=5, new_registers="init")
    assert grown.config == CONFIG.model_copy(update={"registers": 5})
    assert torch.equal(grown.registers.tokens[:there], model.registers.tokens)
    assert torch.pdist(grown.registers.tokens.detach()).min() > 0.01
    rest = [name for name in model.state_dict() if name != "registers.tokens"]
    assert all(torch.equal(grown.state_dict()[name], model.state_dict()[name]) for name in rest)


def test_registers_that_are_there_may_be_asked_for_and_not_taken_away(saved: Path) -> None:
    assert load_model(saved, registers=2).config == CONFIG
    with pytest.raises(InputError, match=r"registers=1: .* has 2, and its other weights rely on them; leave registers"):
        load_model(saved, registers=1, new_registers="init")


def test_fields_that_change_no_tensor_may_be_given(saved: Path) -> None:
    given = {"position_antialias": False, "activation": "quick_gelu", "drop_path": 0.1}
    loaded = load_model(saved, **given)
    assert loaded.config == CONFIG.model_copy(update=given)
    assert weights_hash(loaded) == weights_hash(load_model(saved))
    assert load_model("vit_ti32", registers=3, image_size=64).config.registers == 3


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"embed_dim": 3}, "embed_dim=3: the weights fix it, .* leave it out"),
        ({"image_size": 64}, r"image_size=64: the weights fix it, .* load it, then model.set_input_size\(size\)"),
        ({"num_classes": 0}, r"load it, then model.reset_classifier\(n\)"),
        ({"drop_pat": 0.1}, "drop_pat=0.1: unknown option; did you mean drop_path"),
        ({"drop_path": 2.0}, "drop_path=2.0: Input should be less than 1"),
    ],
)
def test_fields_that_cannot_be_given_are_named(saved: Path, given: dict, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        load_model(saved, **given)


def test_weights_in_several_files_are_read_as_one(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, saved / file)
    (saved / "model.safetensors").unlink()
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert set(load_model(saved).state_dict()) == set(names)
    (saved / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"lists model-1.safetensors, which is not beside it; fetch it too"):
        load_model(saved)
    index.write_text("{}")
    with pytest.raises(InputError, match="no index of weights files; fetch or write it again"):
        load_model(saved)


def test_options_that_a_training_script_saved_are_no_obstacle(tmp_path: Path) -> None:
    theirs = timm_folder(tmp_path / "timm", 0)
    content = {"model": theirs.state_dict(), "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(content, tmp_path / "checkpoint.pth")
    assert load_model(tmp_path / "checkpoint.pth").config.num_classes == 7


def test_loading_leaves_random_numbers_alone(saved: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_model(saved)
    assert torch.rand(1) == expected


@pytest.mark.parametrize("form", ["meta", "sparse", "too large"])
def test_tensors_without_dense_finite_values_are_refused(tmp_path: Path, form: str) -> None:
    made = {
        "meta": lambda: torch.empty(24, device="meta"),
        "sparse": lambda: torch.ones(24).to_sparse(),
        "too large": lambda: torch.full((24,), 1e300, dtype=torch.float64),
    }
    save_model(VisionTransformer(CONFIG, PREPROCESS), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"norm.weight": made[form]()}
    torch.save(tensors, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"named dense tensors|norm.weight holds values that are not finite"):
        load_model(tmp_path / "weights.pth")


def test_safetensors_under_another_name_are_read(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "weights.pth")
    assert load_model(saved / "weights.pth").config == CONFIG


def test_new_registers_need_a_number_and_a_known_way(saved: Path) -> None:
    with pytest.raises(InputError, match=r'new_registers="init" without a number; .* has 2; give registers=n as well'):
        load_model(saved, new_registers="init")
    with pytest.raises(InputError, match=r'new_registers=.copy.: only "init" is known'):
        load_model(saved, registers=4, new_registers="copy")


def test_a_layout_does_not_hide_behind_another(tmp_path: Path) -> None:
    model = VisionTransformer(CONFIG.model_copy(update={"num_classes": 0, "class_position": True}), PREPROCESS)
    save_model(model, tmp_path / "dinov2", layout="dinov2")
    assert load_model(tmp_path / "dinov2", num_heads=3).config.registers == 2
    save_model(model, tmp_path / "ours")
    with pytest.raises(InputError, match="holds a model in another layout, which would be read in its place"):
        save_model(model, tmp_path / "ours", layout="dinov2")
