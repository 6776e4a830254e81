import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.optim import SGD, AdamW
from vitreg_core import create_model
from vitreg_recipes.config import OptimConfig
from vitreg_recipes.optim import lr_at, make_optimizer, parameter_groups, set_lr

DEIT3 = OptimConfig(lr=4e-3, schedule="epochs", warmup_epochs=5)
STEPS = OptimConfig(lr=4e-3, warmup_steps=5)


def test_groups_count_as_in_the_official_code() -> None:
    with torch.device("meta"):
        model = create_model("vit_s16_reg4", num_classes=1000)
    spared, decayed = parameter_groups(model, 0.05)
    assert (len(spared["params"]), sum(p.numel() for p in spared["params"])) == (127, 148_456)
    assert (len(decayed["params"]), sum(p.numel() for p in decayed["params"])) == (50, 21_912_576)
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)


def test_registers_are_not_decayed_and_none_are_left_out() -> None:
    model = create_model("vit_s16_reg4", embed_dim=6, depth=1, num_heads=1)
    assert any(p is model.registers.tokens for p in parameter_groups(model, 0.05)[0]["params"])
    without = create_model("vit_s16", embed_dim=6, depth=1, num_heads=1)
    parameters = [p for group in parameter_groups(without, 0.05) for p in group["params"]]
    assert len(parameters) == len(list(without.parameters())) - 1
    assert all(p.numel() for p in parameters)


def test_lr_matches_the_official_golden_values() -> None:
    golden = {
        0: 1e-6,
        1: 1e-6,
        2: 8.008e-4,
        5: 3.2002e-3,
        6: 3.999615e-3,
        7: 3.999446e-3,
        798: 1.01384e-5,
        799: 1.00615e-5,
    }
    for epoch, lr in golden.items():
        for step in (625 * epoch, 625 * epoch + 624):
            assert lr_at(step, DEIT3, 500_000, 625) == pytest.approx(lr, rel=1e-5)  # they have 6 digits


def test_lr_of_all_800_epochs_is_timms_stepped_after_each_epoch() -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=4e-3)
    theirs = CosineLRScheduler(optimizer, t_initial=800, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    for epoch in range(800):
        ours = {lr_at(step, DEIT3, 4000, 5) for step in range(5 * epoch, 5 * epoch + 5)}
        assert len(ours) == 1
        assert ours.pop() == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        theirs.step(epoch)


def test_lr_by_steps_is_timms_at_every_step() -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=4e-3)
    theirs = CosineLRScheduler(optimizer, t_initial=60, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    for step in range(60):
        theirs.step(step)
        assert lr_at(step, STEPS, 60, 7) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_a_fine_tune_warms_up_to_a_constant() -> None:
    flat = OptimConfig(name="adamw", lr=1e-5, schedule="epochs", warmup_epochs=5)
    rates = [lr_at(step, flat, 20, 1) for step in range(20)]
    assert rates[6:] == [pytest.approx(1e-5)] * 14
    assert rates[:7] == pytest.approx([1e-6, 1e-6, 2.8e-6, 4.6e-6, 6.4e-6, 8.2e-6, 1e-5])


def lamb_steps(
    weights: list[Tensor], gradients: list[list[Tensor]], decays: list[float], rates: list[float]
) -> list[Tensor]:
    """Apex's FusedLAMB by its formula: one clipped norm over all tensors, a trust ratio where there is decay."""
    weights = [weight.clone() for weight in weights]
    means, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for t, (lr, all_gradients) in enumerate(zip(rates, gradients, strict=True), start=1):
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in all_gradients))
        for i, gradient in enumerate(all_gradients):
            clipped = gradient / max(1.0, norm)
            means[i] = 0.9 * means[i] + 0.1 * clipped
            squares[i] = 0.999 * squares[i] + 0.001 * clipped**2
            adam = (means[i] / (1 - 0.9**t)) / ((squares[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            update = adam + decays[i] * weights[i]
            ratio = weights[i].norm() / update.norm() if decays[i] and weights[i].norm() > 0 else 1.0
            weights[i] = weights[i] - lr * ratio * update
    return weights


def test_lamb_follows_its_formula_for_20_steps() -> None:
    model = create_model("vit_s16_reg4", embed_dim=6, depth=1, num_heads=1, image_size=32, num_classes=3).double()
    named = dict(model.named_parameters())
    assert named["head.bias"].norm() == 0
    decays = [0.0 if p.ndim == 1 or name in model.no_weight_decay() else 0.1 for name, p in named.items()]
    before = [parameter.detach().clone() for parameter in named.values()]
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1))
    rates, gradients = [1e-2 / (1 + step) for step in range(20)], []
    for step, lr in enumerate(rates):
        size = 10.0 ** (step % 3 - 2)  # below and above the clipped norm
        gradients.append([size * torch.randn_like(parameter) for parameter in named.values()])
        for parameter, gradient in zip(named.values(), gradients[-1], strict=True):
            parameter.grad = gradient.clone()
        set_lr(optimizer, lr)
        optimizer.step()
    norms = [math.sqrt(sum(float(g.square().sum()) for g in step)) for step in gradients]
    assert min(norms) < 1 < max(norms)
    for name, expected in zip(named, lamb_steps(before, gradients, decays, rates), strict=True):
        torch.testing.assert_close(named[name].detach(), expected, rtol=1e-6, atol=1e-12, msg=name)


def test_adamw_is_torchs_with_two_groups_and_no_clipping() -> None:
    model = create_model("vit_s16", embed_dim=6, depth=1, num_heads=1)
    optimizer = make_optimizer(model, OptimConfig(name="adamw", lr=1e-2, weight_decay=0.1))
    assert type(optimizer) is AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)


def test_adamw_takes_its_first_step_by_the_formula() -> None:
    model = create_model("vit_s16", embed_dim=6, depth=1, num_heads=1)
    optimizer = make_optimizer(model, OptimConfig(name="adamw", lr=1e-2, weight_decay=0.5))
    weight = model.blocks[0].mlp.fc1.weight
    weight.grad = torch.ones_like(weight)
    expected = weight.detach() * (1 - 1e-2 * 0.5) - 1e-2
    optimizer.step()
    torch.testing.assert_close(weight, expected)
    assert math.isclose(optimizer.param_groups[0]["eps"], 1e-8)
