from collections.abc import Iterable

import numpy as np
import pytest
import timm
import torch
from scipy.spatial.distance import cosine
from torch import Tensor
from vitreg_core import VisionTransformer, ViTConfig, as_backbone
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_core.replace_registers import register_statistics, replace_registers
from vitreg_eval.analyses.replacement import audit_registers, plot_replacement, without_lone_images


@pytest.fixture
def model() -> VisionTransformer:
    """A model whose registers matter and differ by image."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, registers=2, num_classes=4)
    built = VisionTransformer(config).eval()
    with torch.no_grad():
        for value in built.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return built


@pytest.fixture
def images() -> Tensor:
    return torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def batches(images: Tensor) -> Iterable[Tensor]:
    return images.split(4)


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_numbers_are_those_of_replacing_by_hand(model: VisionTransformer, images: Tensor, pool: str) -> None:
    model.config = override(model.config, {"pool": pool})
    with torch.no_grad():
        plain, labels = model(images), model.classify(images).argmax(dim=1)
        labels[0] = (labels[0] + 1) % 4
        found = audit_registers(model, lambda: batches(images), labels=labels)
        statistics = register_statistics(model, [images])
        assert found.untouched_top1 is not None
        assert found.untouched_top1.value == pytest.approx(8 / 9)
        for kind, one in zip(("zero", "mean"), found.kinds, strict=False):
            with replace_registers(model, kind, statistics=statistics):
                touched, right = model(images), model.classify(images).argmax(dim=1) == labels
            assert one.kind == kind
            of_cls = [1 - cosine(*pair) for pair in zip(touched.cls, plain.cls, strict=True)]
            of_patches = [
                np.mean([1 - cosine(*pair) for pair in zip(*both, strict=True)])
                for both in zip(touched.patches, plain.patches, strict=True)
            ]
            assert one.cls is not None
            assert one.top1 is not None
            assert one.cls.value == pytest.approx(np.mean(of_cls), abs=1e-5)
            assert one.patches.value == pytest.approx(np.mean(of_patches), abs=1e-5)
            assert one.top1.value == pytest.approx(right.double().mean().item())
    assert [one.kind for one in found.kinds] == ["zero", "mean", "shuffled", "noise"]
    assert found.images == 9


def test_registers_that_are_the_same_in_every_image_can_be_swapped_and_averaged_but_not_zeroed(
    model: VisionTransformer, images: Tensor
) -> None:
    same = images[:1].expand(6, -1, -1, -1)
    found = {one.kind: one for one in audit_registers(model, lambda: batches(same)).kinds}
    for kind in ("mean", "shuffled", "noise"):
        assert found[kind].cls is not None
        assert found[kind].cls.value == pytest.approx(1, abs=1e-5)
        assert found[kind].patches.value == pytest.approx(1, abs=1e-5)
    assert found["zero"].patches.value < 0.999
    assert found["zero"].top1 is None


def test_after_the_last_block_nothing_else_changes(model: VisionTransformer, images: Tensor) -> None:
    found = audit_registers(model, lambda: batches(images), layers=[-1])
    assert found.layers == (-1,)
    assert all(one.patches.value == pytest.approx(1, abs=1e-6) for one in found.kinds)


def test_calibration_images_give_the_mean(model: VisionTransformer, images: Tensor) -> None:
    others = torch.randn(3, 3, 16, 16)
    found = audit_registers(model, lambda: [images[:1], images[1:2]], calibration=lambda: [others])
    with torch.no_grad(), replace_registers(model, "mean", statistics=register_statistics(model, [others])):
        touched = model(images[:2]).cls
        pairs = zip(touched, audit_plain(model, images[:2]), strict=True)
    assert found.kinds[1].cls is not None
    assert found.kinds[1].cls.value == pytest.approx(np.mean([1 - cosine(*pair) for pair in pairs]), abs=1e-5)


def audit_plain(model: VisionTransformer, images: Tensor) -> Tensor:
    """Class tokens of the untouched model, from its blocks, on which no hook acts here."""
    tokens = model.embed(images)
    for block in model.blocks:
        tokens = block.forward(tokens, None, ())
    return model.norm(tokens)[:, 0]


def test_every_batch_draws_anew_and_the_seed_repeats_it(model: VisionTransformer, images: Tensor) -> None:
    def noise(seed: int, given: Tensor) -> float:
        return audit_registers(model, lambda: given.split(2), seed=seed).kinds[3].patches.value

    assert noise(1, images[:4]) == noise(1, images[:4])
    assert noise(1, images[:4]) != noise(2, images[:4])


def test_a_foreign_model_without_class_token_has_patches_alone(images: Tensor) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    options = {"class_token": False, "global_pool": "avg", "reg_tokens": 2, "no_embed_class": True}
    theirs = timm.models.vision_transformer.VisionTransformer(**sizes, **options).eval()
    found = audit_registers(as_backbone(theirs), lambda: batches(images), labels=torch.zeros(9, dtype=torch.long))
    assert [one.cls for one in found.kinds] == [one.top1 for one in found.kinds] == [None] * 4
    assert found.untouched_top1 is None  # its head is not read
    assert len(plot_replacement(found).axes[0].containers) == 2  # bars and their intervals


def test_lone_images_join_their_neighbours(images: Tensor) -> None:
    for sizes in ([4, 4, 1], [1, 8], [1, 1, 1, 6], [8, 1]):
        joined = list(without_lone_images(images.split(sizes)))
        assert torch.equal(torch.cat(joined), images)
        assert min(map(len, joined)) > 1
    with pytest.raises(InputError, match="1 images; registers are replaced by those of others: give 2 or more"):
        list(without_lone_images([images[:1]]))
    with pytest.raises(InputError, match="images of 16x16 and 16x8 pixels, one of them alone in its batch"):
        list(without_lone_images([images[:1], images[:2, :, :, :8]]))


def test_labels_of_other_images_are_refused(model: VisionTransformer, images: Tensor) -> None:
    with pytest.raises(InputError, match="3 labels for 9 images; give one label for each image"):
        audit_registers(model, lambda: batches(images), labels=torch.zeros(3, dtype=torch.long))


def test_plot_shows_every_kind(model: VisionTransformer, images: Tensor) -> None:
    found = audit_registers(model, lambda: batches(images), labels=torch.zeros(9, dtype=torch.long))
    figure = plot_replacement(found)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [one.cls.value for one in found.kinds if one.cls] + [one.patches.value for one in found.kinds]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [one.top1.value for one in found.kinds if one.top1]
