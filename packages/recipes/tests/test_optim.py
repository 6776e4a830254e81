import copy
import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from vitreg_core import create_model
from vitreg_recipes.config import OptimConfig
from vitreg_recipes.optim import lr_at, make_optimizer, parameter_groups

DEIT3 = OptimConfig(lr=4e-3, warmup_steps=5)


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
    golden = {0: 1e-6, 1: 8.008e-4, 4: 3.2002e-3, 5: 3.999615e-3, 6: 3.999446e-3, 797: 1.01384e-5, 798: 1.00615e-5}
    for step, lr in golden.items():
        assert lr_at(step, DEIT3, 800) == pytest.approx(lr, rel=1e-5)


def test_lr_matches_timm_at_every_step() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=4e-3)
    theirs = CosineLRScheduler(optimizer, t_initial=60, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    for step in range(60):
        theirs.step(step)
        assert lr_at(step, DEIT3, 60) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def lamb_step(weight: Tensor, gradient: Tensor, norm: Tensor, lr: float, decay: float) -> Tensor:
    """First LAMB step by the formula of apex's FusedLAMB, from the reference notes."""
    clipped = gradient / max(1.0, float(norm))
    update = clipped / (clipped.abs() + 1e-8) + decay * weight
    ratio = weight.norm() / update.norm() if decay else 1.0
    return weight - lr * ratio * update


def test_lamb_follows_the_formula_with_one_norm_over_all_and_no_trust_ratio_without_decay() -> None:
    model = create_model("vit_s16_reg4", embed_dim=6, depth=1, num_heads=1, image_size=32, num_classes=3)
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1))
    (model.classify(torch.randn(2, 3, 32, 32)).square().sum() * 100).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert norm > 1.0
    optimizer.step()
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name in model.no_weight_decay()
        expected = lamb_step(before[name], gradients[name], norm, 1e-2, 0.0 if spared else 0.1)
        torch.testing.assert_close(parameter, expected, msg=name)


def test_adamw_takes_its_first_step_by_the_formula() -> None:
    model = create_model("vit_s16", embed_dim=6, depth=1, num_heads=1)
    optimizer = make_optimizer(model, OptimConfig(name="adamw", lr=1e-2, weight_decay=0.5))
    weight = model.blocks[0].mlp.fc1.weight
    weight.grad = torch.ones_like(weight)
    expected = weight.detach() * (1 - 1e-2 * 0.5) - 1e-2
    optimizer.step()
    torch.testing.assert_close(weight, expected)
    assert math.isclose(optimizer.param_groups[0]["eps"], 1e-8)
