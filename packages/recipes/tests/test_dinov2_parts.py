"""Heads, targets, losses, masks and schedules against values that the official modules gave (float32, CPU)."""

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from vitreg_core.config import override
from vitreg_recipes.dinov2.config import DinoConfig
from vitreg_recipes.dinov2.head import DinoHead
from vitreg_recipes.dinov2.losses import cross_entropy, dino_loss, gram_loss, ibot_loss, koleo_loss, masked_weights
from vitreg_recipes.dinov2.masks import draw_mask, draw_masks
from vitreg_recipes.dinov2.schedules import DinoSchedule, line, momentum
from vitreg_recipes.dinov2.targets import Center, SinkhornKnopp


def wave(shape: tuple[int, ...], phase: float, height: float) -> Tensor:
    """Numbers that everybody can make again."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return (height * torch.sin(0.7 * count + phase)).float().reshape(shape)


def close(ours: Tensor, theirs: list[float], digits: float = 2e-6) -> None:
    torch.testing.assert_close(ours, torch.tensor(theirs), rtol=2e-5, atol=digits)


def test_the_head_is_the_official_one() -> None:
    head = DinoHead(32, prototypes=64, hidden=48, bottleneck=16, layers=3)
    names = sorted(name for name, _ in head.named_parameters())
    ours = dict(head.named_parameters())
    assert names == [
        "last_layer.weight_g",
        "last_layer.weight_v",
        *(f"mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("bias", "weight")),
    ]
    with torch.no_grad():
        for number, name in enumerate(names):
            ours[name].copy_(wave(tuple(ours[name].shape), number, 0.3))
        ours["last_layer.weight_g"].copy_(1 + wave((64, 1), 0, 0.1))
        found = head(wave((2, 32), 0.2, 1.0))
    close(found[1, :5], [0.135664, 0.566646, 0.068301, -0.533683, -0.268625])


def test_prototypes_are_weight_normalised() -> None:
    torch.manual_seed(0)
    head = DinoHead(8, prototypes=6, hidden=8, bottleneck=5, layers=1)
    theirs = weight_norm(torch.nn.Linear(5, 6, bias=False))
    values = head.last_layer.state_dict()
    theirs.parametrizations.weight.original0.data.copy_(values["weight_g"])
    theirs.parametrizations.weight.original1.data.copy_(values["weight_v"])
    directions = torch.randn(3, 5)
    torch.testing.assert_close(head.last_layer(directions), theirs(directions))
    assert [type(part).__name__ for part in head.mlp] == ["Linear"]


def test_sinkhorn_gives_the_official_targets() -> None:
    targets = SinkhornKnopp()(wave((6, 12), 1, 0.5), 0.05)
    first = [0.142600, 0.182876, 0.177476, 0.000011, 0, 0, 0, 0, 0.001968, 0.143461, 0.183877, 0.167732]
    columns = [0.357322, 0.357573, 0.402489, 0.597090, 0.599336, 0.605382, 0.652512, 0.652397, 0.647401]
    close(targets[0], first)
    close(targets.sum(dim=0), [*columns, 0.357288, 0.357585, 0.413625])
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))


def test_sinkhorn_survives_large_logits_and_no_rows() -> None:
    logits = wave((6, 12), 1, 0.5)
    torch.testing.assert_close(SinkhornKnopp()(logits + 50, 0.05), SinkhornKnopp()(logits, 0.05), rtol=1e-3, atol=1e-5)
    assert SinkhornKnopp()(logits[:0], 0.05).shape == (0, 12)


def test_the_centre_counts_from_the_next_call_on() -> None:
    center, logits = Center(12), wave((6, 12), 1, 0.5)
    close(center(logits, 0.05)[0, :4], [0.088219, 0.396137, 0.016773, 2.96e-5])
    close(center.center[0, :4], [5.688e-6, 4.183e-4, 6.342e-4, 5.518e-4], 1e-7)
    close(center(logits, 0.05)[0, :4], [0.088833, 0.395616, 0.016678, 2.95e-5])


def test_koleo_has_the_official_values() -> None:
    rows = wave((5, 8), 0.3, 1.0)
    assert koleo_loss(rows).item() == pytest.approx(0.431424, abs=2e-6)
    assert koleo_loss(rows[[0, 0, 1]]).item() == pytest.approx(11.524508, abs=2e-5)
    assert torch.isfinite(koleo_loss(rows[[0, 0, 1]].half()))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("center", (5.229735, 1.120905, 0.078474, 1.519569)), ("sinkhorn", (5.203577, 1.317834, 0.078474, 1.593419))],
)
def test_the_whole_loss_is_the_official_one(mode: str, expected: tuple[float, ...]) -> None:
    images, local_crops, prototypes = 3, 2, 12
    targets = (lambda: Center(prototypes)) if mode == "center" else SinkhornKnopp
    teacher = targets()(wave((6, 12), 1, 0.5), 0.05).reshape(2, images, prototypes)
    student = wave((6, 12), 2, 0.5).reshape(2, images, prototypes)
    local, crossed = dino_loss(teacher, student, wave((6, 12), 3, 0.5).reshape(local_crops, images, prototypes))
    masks = torch.zeros(6, 9, dtype=torch.bool)
    masks[0, :2] = masks[3, 3:7] = masks[5, 0] = True
    _, weights = masked_weights(masks)
    assert weights.tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 1.0]
    ibot = ibot_loss(targets()(wave((7, 12), 4, 0.5), 0.05), wave((7, 12), 5, 0.5), weights, crops=6)
    koleo = 0.1 * sum(koleo_loss(crop) for crop in wave((6, 8), 6, 1.0).chunk(2))
    assert [float(part) for part in (local, crossed, koleo, ibot)] == pytest.approx(expected, abs=3e-6)


def test_cross_entropy_is_that_of_torch() -> None:
    torch.manual_seed(0)
    student, targets = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64).softmax(dim=-1)
    theirs = F.cross_entropy(student / 0.1, targets, reduction="none")
    torch.testing.assert_close(cross_entropy(student, targets), theirs, check_dtype=False)


def test_no_local_crops_leave_the_global_part() -> None:
    teacher, student = torch.rand(2, 3, 5).softmax(-1), torch.randn(2, 3, 5)
    local, crossed = dino_loss(teacher, student, torch.zeros(0, 3, 5))
    assert local.item() == 0
    torch.testing.assert_close(crossed, cross_entropy(student, teacher.flip(0)).mean())


def test_gram_anchoring_is_zero_for_rotated_patches() -> None:
    torch.manual_seed(0)
    patches = torch.randn(2, 7, 6)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    assert gram_loss(3 * patches @ rotation, patches).item() == pytest.approx(0, abs=1e-12)
    cosines = F.cosine_similarity(patches[:, :, None], patches[:, None], dim=-1)
    other = torch.randn(2, 7, 6)
    theirs = F.cosine_similarity(other[:, :, None], other[:, None], dim=-1)
    torch.testing.assert_close(gram_loss(other, patches), (cosines - theirs).square().mean())


def test_masks_are_the_official_ones() -> None:
    mask = draw_mask((16, 16), 100, random.Random(1234), most=128)
    assert mask.sum() == 100
    assert mask.sum(axis=1).tolist() == [11] * 9 + [0, 0, 0, 0, 0, 1, 0]
    small = draw_mask((16, 16), 30, random.Random(1234), most=128)
    expected = np.zeros((16, 16), dtype=bool)
    expected[:5, 1:7] = True
    assert (small == expected).all()


def test_masks_are_stratified_and_never_too_large() -> None:
    generator = random.Random(0)
    for _ in range(20):
        masks = draw_masks(32, (14, 14), generator, share=0.5, ratios=(0.1, 0.5))
        counts = sorted(masks.sum(dim=1).tolist())
        assert counts[:16] == [0] * 16
        edges = torch.linspace(0.1, 0.5, 17).tolist()
        for count, low, high in zip(counts[16:], edges[:-1], edges[1:], strict=True):
            assert int(196 * low) - 8 <= count <= 196 * high


def test_a_whole_step_masks_as_many_patches_as_the_official_code() -> None:
    masked = [int(draw_masks(64, (16, 16), random.Random(s), share=0.5, ratios=(0.1, 0.5)).sum()) for s in range(10)]
    assert np.mean(masked) == pytest.approx(2431, rel=0.02)
    assert max(masked) <= 2496


SHORT = override(DinoConfig(), {"steps": 125_000, "data.batch_size": 2048})
LONG = override(
    DinoConfig(),
    {
        "steps": 625_000,
        "data.batch_size": 3072,
        "optim.lr": 2e-4,
        "optim.warmup_steps": 100_000,
        "optim.weight_decay": (0.04, 0.2),
        "teacher.momentum": 0.994,
    },
)


@pytest.mark.parametrize(
    ("config", "step", "lr", "decay", "kept", "temperature"),
    [
        (SHORT, 0, 0, 0.04, 0.992, 0.04),
        (SHORT, 1249, 5.652781e-4, 0.0400887, 0.99200197, 0.0409992),
        (SHORT, 1250, 5.6573068e-4, 0.0400888, 0.99200197, 0.0410000),
        (SHORT, 12499, 5.6568542e-3, 0.0488084, 0.99219574, 0.0499995),
        (SHORT, 12500, 5.6568542e-3, 0.0488098, 0.99219577, 0.0500003),
        (SHORT, 62500, 3.3199915e-3, 0.22, 0.996, 0.07),
        (SHORT, 124999, 1.0000011e-6, 0.4, 1.0, 0.07),
        (LONG, 1250, 4.3301703e-6, 0.0400016, 0.99400006, 0.0410000),
        (LONG, 100000, 3.4641016e-4, 0.0498955, 0.99437108, 0.07),
        (LONG, 312500, 2.246108e-4, 0.12, 0.997, 0.07),
    ],
)
def test_schedules_have_the_official_values(
    config: DinoConfig, step: int, lr: float, decay: float, kept: float, temperature: float
) -> None:
    assert config.steps is not None
    schedule = DinoSchedule(config, config.steps)
    assert schedule.lr(step) == pytest.approx(lr, rel=2e-7, abs=1e-13)
    assert schedule.weight_decay(step) == pytest.approx(decay, rel=2e-6)
    assert momentum(step, config.steps, config.teacher.momentum) == pytest.approx(kept, abs=1e-8)
    assert line(step, 37_500, 0.04, 0.07) == pytest.approx(temperature, abs=1e-7)
