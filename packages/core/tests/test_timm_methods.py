import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from vitreg_core import VisionTransformer, load_model
from vitreg_core.errors import InputError

TOKENS = {"global_pool": "token", "class_token": True}
MEAN = {"global_pool": "avg", "class_token": False}


def pair(folder: Path, **changes: object) -> tuple[VisionTransformer, timm.models.VisionTransformer]:
    """The same random weights in both libraries."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 3, "num_heads": 3, "num_classes": 7}
    shape |= {"reg_tokens": 2, "no_embed_class": True, "dynamic_img_size": True}
    theirs = timm.models.VisionTransformer(**(shape | changes)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"global_pool": shape.get("global_pool", changes.get("global_pool"))})
    )
    return load_model(folder), theirs


@pytest.fixture(params=[TOKENS, MEAN], ids=["class token", "mean"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[VisionTransformer, timm.models.VisionTransformer]:
    return pair(tmp_path, **request.param)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 40)


def assert_same(mine: object, theirs: object) -> None:
    """Nested tensors are equal, in the same containers."""
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    else:
        assert type(mine) is type(theirs)
        for one, other in zip(mine, theirs, strict=True):
            assert_same(one, other)


def test_features_and_head_equal_timms(models: tuple) -> None:
    ours, theirs = models
    tokens = theirs.forward_features(images())
    torch.manual_seed(0)
    photos = images()
    assert_same(ours.forward_features(photos), theirs.forward_features(photos))
    for pre_logits in (False, True):
        assert_same(
            ours.forward_head(tokens, pre_logits=pre_logits), theirs.forward_head(tokens, pre_logits=pre_logits)
        )
    assert_same(ours.classify(photos), theirs(photos))


@pytest.mark.parametrize("indices", [None, 1, 2, [0, 2], [2, 0], [-1]])
@pytest.mark.parametrize("options", [{}, {"return_prefix_tokens": True, "norm": True}, {"output_fmt": "NLC"}], ids=str)
def test_intermediates_equal_timms(models: tuple, indices: object, options: dict) -> None:
    ours, theirs, photos = *models, images()
    assert_same(
        ours.forward_intermediates(photos, indices, **options), theirs.forward_intermediates(photos, indices, **options)
    )
    options |= {"intermediates_only": True}
    assert_same(
        ours.forward_intermediates(photos, indices, **options), theirs.forward_intermediates(photos, indices, **options)
    )


@pytest.mark.parametrize("n", [1, 3, [0, 2]])
@pytest.mark.parametrize("options", [{}, {"reshape": True, "norm": True}, {"return_prefix_tokens": True}], ids=str)
def test_intermediate_layers_equal_timms(models: tuple, n: object, options: dict) -> None:
    ours, theirs, photos = *models, images()
    assert_same(
        ours.get_intermediate_layers(photos, n, **options), list(theirs.get_intermediate_layers(photos, n, **options))
    )


def test_numbers_are_those_of_timm(models: tuple) -> None:
    ours, theirs = models
    names = ("num_prefix_tokens", "num_features", "head_hidden_size", "num_classes", "feature_info")
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.get_classifier() is ours.head


@pytest.mark.parametrize("pool", [None, "avg"])
def test_a_new_head_reads_what_it_is_told(models: tuple, pool: str | None) -> None:
    ours, theirs = models
    ours.reset_classifier(4, pool)
    theirs.reset_classifier(4, pool)
    assert ours.num_classes == ours.config.num_classes == 4
    assert ours.head.bias.abs().max() == 0
    photos = images()
    ours.load_state_dict(ours.state_dict() | {"head.weight": theirs.head.weight, "head.bias": theirs.head.bias})
    assert_same(ours.classify(photos), theirs(photos))
    ours.reset_classifier(0)
    assert ours.head is None
    with pytest.raises(InputError, match="no classification head"):
        ours.classify(photos)


def test_a_new_input_size_resizes_the_positions_for_good(models: tuple) -> None:
    ours, theirs = models
    photos = torch.randn(1, 3, 48, 24)
    expected = ours(photos).tokens
    ours.set_input_size((48, 24))
    theirs.set_input_size((48, 24))
    assert ours.config.grid == (6, 3)
    assert_same(ours.positions.patches, theirs.pos_embed[0])
    assert_same(ours(photos).tokens, expected)
    assert_same(ours.forward_features(photos), theirs.forward_features(photos))


def test_layers_sort_into_as_many_groups_as_timms(models: tuple) -> None:
    ours, theirs = models
    for coarse in (False, True):
        mine, other = (
            timm.models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
            for model in (ours, theirs)
        )
        assert [mine[f"blocks.{index}.attn.qkv.weight"] for index in range(3)] == [
            other[f"blocks.{index}.attn.qkv.weight"] for index in range(3)
        ]
        assert mine["positions.patches"] == mine["patch_embed.proj.weight"] == other["pos_embed"] == 0


def test_more_blocks_than_there_are_is_refused(models: tuple) -> None:
    with pytest.raises(InputError, match="the last 4 blocks of 3; give 1 to 3"):
        models[0].get_intermediate_layers(images(), 4)


def test_what_cannot_be_done_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    ours, _ = pair(tmp_path, **MEAN)
    before = ours.config
    for change, advice in (
        (lambda: ours.set_input_size(4), "smaller than patch_size=8"),
        (lambda: ours.reset_classifier(3, "token"), 'without a class token the head reads the patches; set pool="avg"'),
        (lambda: ours.reset_classifier(3, "max"), "global_pool='max' is not one of"),
    ):
        with pytest.raises(InputError, match=advice):
            change()
        assert ours.config == before
    assert ours.positions.native == (4, 4)
