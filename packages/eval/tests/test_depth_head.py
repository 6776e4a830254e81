import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from vitreg_core import VisionTransformer, ViTConfig
from vitreg_core.errors import InputError
from vitreg_eval.depth_head import (
    DepthHead,
    HeadRecord,
    TrainedHead,
    head_layers,
    join_maps,
    load_head,
    model_hash,
    resize_depth,
    save_head,
    sig_loss,
)
from vitreg_eval.depth_predict import depth_features
from vitreg_eval.depth_train import depth_loss

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, registers=1)


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(CONFIG).eval()
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(20)  # so that the random model tells bright from dark
    return model


def sine(shape: tuple[int, ...], phase: float, scale: float) -> Tensor:
    """The test tensors of reference/dinov2.md, section 6."""
    values = scale * np.sin(0.7 * np.arange(math.prod(shape)) + phase)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


# The head


@pytest.mark.parametrize(("max_depth", "mean"), [(10.0, 5.356826), (80.0, 42.85136)])
def test_the_head_equals_the_golden_values(max_depth: float, mean: float) -> None:
    """reference/dinov2.md 6.7."""
    head = DepthHead(12, bins=8, max_depth=max_depth)
    with torch.no_grad():
        head.conv.weight.copy_(sine((8, 12, 1, 1), 0, 0.5))
        assert head.conv.bias is not None
        head.conv.bias.copy_(sine((8,), 1, 0.1))
        found = head(join_maps(sine((1, 1, 6, 3, 4), 0.3, 1), sine((1, 1, 6), 0.9, 1)))
    assert found.shape == (1, 12, 16)
    assert found.mean().item() == pytest.approx(mean, rel=1e-6)
    if max_depth == 10:
        expected = torch.tensor([5.314207, 5.314207, 5.308551, 5.297103, 5.285470])
        torch.testing.assert_close(found[0, 5, :5], expected, rtol=0, atol=2e-6)


def test_the_layer_first_gives_what_enlarging_the_features_first_gives() -> None:
    head = DepthHead(10)
    with torch.no_grad():
        head.conv.weight.normal_()
        features = torch.randn(2, 10, 3, 5)
        weights = head.conv(F.interpolate(features, scale_factor=4, mode="bilinear")).relu() + 0.1
        bins = torch.linspace(1e-3, 10, 256)
        expected = (weights / weights.sum(dim=1, keepdim=True) * bins[:, None, None]).sum(dim=1)
        torch.testing.assert_close(head(features), expected, rtol=1e-5, atol=1e-5)


def test_the_maps_of_several_blocks_stand_side_by_side_each_with_its_class_token() -> None:
    patches, cls = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4)
    joined = join_maps(patches, cls)
    assert joined.shape == (2, 24, 2, 2)
    assert torch.equal(joined[:, 8:12], patches[:, 1])
    assert torch.equal(joined[:, 12:16, 1, 0], cls[:, 1])


@pytest.mark.parametrize(
    ("count", "blocks", "expected"),
    [(1, 12, (11,)), (4, 12, (2, 5, 8, 11)), (4, 24, (4, 11, 17, 23)), (4, 40, (9, 19, 29, 39)), (1, 24, (23,))],
)
def test_heads_read_the_blocks_that_dinov2_chose(count: int, blocks: int, expected: tuple[int, ...]) -> None:
    assert head_layers(count, blocks) == expected


def test_features_of_the_head_are_those_of_the_blocks_without_the_final_norm(model: VisionTransformer) -> None:
    images = torch.randn(1, 3, 32, 32)
    record = HeadRecord(layers=(1, 3), channels=96)
    found = depth_features(model, images, record, "fp32")
    with torch.no_grad():
        raw = model.intermediate(images, (1, 3), norm=False)
    assert raw[0].cls is not None
    torch.testing.assert_close(found[:, :24], raw[0].patch_map)
    torch.testing.assert_close(found[0, 24:48, 2, 3], raw[0].cls[0])
    torch.testing.assert_close(found[:, 48:72], raw[1].patch_map)


# The loss


def test_the_loss_equals_the_golden_values() -> None:
    """reference/dinov2.md 6.7."""
    predicted, truth = 2 + sine((1, 6, 7), 0.2, 1), 2 + sine((1, 6, 7), 1.1, 1)
    truth[0, 0, :3] = 0
    truth[0, 1, 0] = 11
    assert sig_loss(predicted, truth).item() == pytest.approx(0.342929, abs=1e-6)
    assert sig_loss(predicted, truth, warm_up=True).item() == pytest.approx(0.017322, abs=1e-6)


def test_the_loss_of_a_wrong_scale_is_its_logarithm() -> None:
    truth = torch.rand(1, 4, 4) + 1
    predicted = math.e * (truth + 1e-3) - 1e-3
    assert sig_loss(predicted, truth).item() == pytest.approx(math.sqrt(0.15), abs=1e-5)


def test_the_loss_without_readings_is_zero_and_has_a_gradient() -> None:
    predicted = torch.ones(1, 2, 2, requires_grad=True)
    sig_loss(predicted, torch.zeros(1, 2, 2)).backward()
    assert predicted.grad is not None
    assert predicted.grad.abs().sum() == 0


def test_the_first_steps_leave_the_variance_out() -> None:
    predicted, truth = torch.rand(1, 4, 4) + 1, torch.rand(1, 8, 8) + 1
    stretched = resize_depth(predicted, (8, 8))
    assert depth_loss(10.0, 5, predicted, truth, 4) == sig_loss(stretched, truth, warm_up=True)
    assert depth_loss(10.0, 5, predicted, truth, 5) == sig_loss(stretched, truth)


# Files


def trained_head(model: VisionTransformer, max_depth: float = 10.0) -> TrainedHead:
    record = HeadRecord(layers=(3,), channels=48, max_depth=max_depth, model_hash=model_hash(model))
    return TrainedHead(DepthHead(48, max_depth=max_depth), record)


def test_a_head_comes_back_from_its_file(model: VisionTransformer, tmp_path: Path) -> None:
    trained = trained_head(model, max_depth=80.0)
    path = save_head(trained, tmp_path / "new")
    assert sorted(file.name for file in path.parent.iterdir()) == ["head.json", "head.safetensors"]
    for source in (path, path.parent):
        loaded = load_head(source, model, max_depth=10.0)
        assert loaded.record == trained.record
        features = torch.randn(1, 48, 2, 2)
        assert torch.equal(loaded.head(features), trained.head(features))


def test_a_head_of_another_model_is_refused(model: VisionTransformer, tmp_path: Path) -> None:
    save_head(trained_head(model), tmp_path)
    torch.manual_seed(1)
    with pytest.raises(InputError, match="was trained on the features of another model; give the --model it belongs"):
        load_head(tmp_path, VisionTransformer(CONFIG), 10.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_depth": -1}, r"head.json: max_depth: Input should be greater than 0"),
        ({"layers": "all"}, r"head.json: layers: "),
        ({"bins": 128}, r"tensor conv\.\w+ has shape .* nothing was loaded"),
        ({"min_depth": 20}, r"depths from 20.0 to 10.0 m; write the head again"),
        ({"owner": "x"}, r"head.json: owner: Extra inputs"),
        ({"layers": [9]}, r"reads block 9 of a model with 4 blocks"),
        ({"channels": 24}, r"24 features of 1 blocks do not fit a model of width 24"),
    ],
)
def test_a_damaged_record_is_named(
    model: VisionTransformer, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = save_head(trained_head(model), tmp_path).with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load_head(tmp_path, model, 10.0)


def test_files_that_are_no_head_are_named(model: VisionTransformer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.pth: no such file; give --head a head\.safe"):
        load_head(tmp_path / "nowhere.pth", model, 10.0)
    (tmp_path / "head.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="not a readable weights file"):
        load_head(tmp_path, model, 10.0)
    save_head(trained_head(model), tmp_path)
    (tmp_path / "head.json").write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        load_head(tmp_path, model, 10.0)
    (tmp_path / "head.json").unlink()
    with pytest.raises(InputError, match=r"head\.json: no such file; a head needs the \.json"):
        load_head(tmp_path, model, 10.0)


@pytest.mark.parametrize(("count", "layers"), [(1, (3,)), (4, (0, 1, 2, 3))])
def test_released_heads_are_read_by_their_names(
    model: VisionTransformer, tmp_path: Path, count: int, layers: tuple[int, ...]
) -> None:
    """Names and shapes of reference/dinov2.md 1.10."""
    weight, bias = torch.randn(256, 2 * count * 24, 1, 1), torch.randn(256)
    state = {"decode_head.conv_depth.weight": weight, "decode_head.conv_depth.bias": bias}
    torch.save({"state_dict": state | {"backbone.cls_token": torch.zeros(1)}, "meta": {}}, tmp_path / "head.pth")
    loaded = load_head(tmp_path / "head.pth", model, max_depth=80.0)
    assert loaded.record.layers == layers
    assert loaded.record.released
    assert loaded.head.bins[-1] == 80
    assert torch.equal(loaded.head.conv.weight, weight)
    assert loaded.head.conv.bias is not None
    assert torch.equal(loaded.head.conv.bias, bias)


def test_a_released_head_for_another_width_is_refused(model: VisionTransformer, tmp_path: Path) -> None:
    state = {
        "decode_head.conv_depth.weight": torch.zeros(256, 768, 1, 1),
        "decode_head.conv_depth.bias": torch.zeros(256),
    }
    torch.save({"state_dict": state}, tmp_path / "head.pth")
    with pytest.raises(InputError, match=r"weights of \(256, 768, 1, 1\) does not fit a model of width 24"):
        load_head(tmp_path / "head.pth", model, 10.0)


@pytest.mark.parametrize("shape", [(), (0,), (1, 48, 1, 1), (256, 0, 1, 1), (256, 48)])
def test_weights_of_no_head_are_refused(model: VisionTransformer, tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = {"decode_head.conv_depth.weight": torch.zeros(shape), "decode_head.conv_depth.bias": torch.zeros(shape[:1])}
    torch.save({"state_dict": state}, tmp_path / "head.pth")
    with pytest.raises(InputError, match="does not fit a model of width 24"):
        load_head(tmp_path / "head.pth", model, 10.0)
