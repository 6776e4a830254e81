import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from jaxtyping import Float
from scipy import stats
from torch.nn import functional as F
from vitreg_core import VisionTransformer, ViTConfig
from vitreg_recipes import find
from vitreg_recipes.config import LossConfig, MixConfig, OptimConfig
from vitreg_recipes.data import Batch
from vitreg_recipes.objectives import Objective
from vitreg_recipes.objectives.classify import Classifier, Classify
from vitreg_recipes.optim import make_optimizer

NONE = MixConfig(mixup=0.0, cutmix=0.0)
BCE = LossConfig(name="bce")


def objective(mix: MixConfig, loss: LossConfig, **shapes: float) -> tuple[VisionTransformer, Classify]:
    """A tiny model and the signal on it."""
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 8, "num_heads": 2, "depth": 2, "num_classes": 5}
    model = VisionTransformer(ViTConfig(**(sizes | shapes)))
    accelerator = Accelerator(cpu=True)
    return model, Classify(accelerator.prepare(Classifier(model)), accelerator, 5, mix, loss)


def batch() -> Batch:
    return Batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 2]))


def test_it_is_an_objective() -> None:
    assert isinstance(objective(NONE, BCE)[1], Objective)


def test_bce_counts_both_classes_of_a_mix_as_fully_there() -> None:
    model, classify = objective(MixConfig(mixup=0.8, cutmix=0.0), BCE)
    images, labels = batch().images, batch().labels
    np.random.seed(0)  # noqa: NPY002
    mixed, targets = classify.mix(Batch(images.clone(), labels))
    share = targets[0, 0].item()
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
    expected = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 0, 1, 0, 0]]).float()
    np.random.seed(0)  # noqa: NPY002
    loss = classify.step(Batch(images.clone(), labels))["loss"]
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(model.classify(mixed), expected))


def test_cross_entropy_is_torchs_with_smoothing() -> None:
    model, classify = objective(NONE, LossConfig(name="ce", smoothing=0.1))
    theirs = F.cross_entropy(model.classify(batch().images * 0), batch().labels, label_smoothing=0.1)
    ours = classify.step(Batch(torch.zeros(4, 3, 16, 16), batch().labels))["loss"]
    torch.testing.assert_close(ours, theirs)


def test_soft_cross_entropy_is_torchs_on_smoothed_mixed_targets() -> None:
    model, classify = objective(MixConfig(mixup=0.0, cutmix=1.0), LossConfig(name="ce", smoothing=0.1))
    one = Batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 2]))
    np.random.seed(0)  # noqa: NPY002
    mixed, targets = classify.mix(Batch(one.images.clone(), one.labels))
    pasted = (mixed != one.images).any(1).any(0).float().mean().item()  # share of the area that was pasted
    assert 0 < pasted < 1
    smooth = F.one_hot(one.labels, 5) * 0.9 + 0.1 / 5
    torch.testing.assert_close(targets, (1 - pasted) * smooth + pasted * smooth.flip(0))
    np.random.seed(0)  # noqa: NPY002
    loss = classify.step(Batch(one.images.clone(), one.labels))["loss"]
    torch.testing.assert_close(loss, F.cross_entropy(model.classify(mixed), targets))


def test_mixup_and_cutmix_draw_their_shares_as_published() -> None:
    mixer = objective(MixConfig(mixup=0.8, cutmix=1.0), BCE)[1].mixup
    assert mixer is not None
    np.random.seed(0)  # noqa: NPY002
    mixed, cut, corners = [], [], torch.tensor([0, 0, 1, 1])
    for _ in range(1500):
        images = torch.stack([torch.zeros(3, 64, 64)] * 2 + [torch.ones(3, 64, 64)] * 2)
        seen, targets = mixer(images, corners)
        pixels, kept = seen[0, 0], targets[0, 0].item()
        if 0 < pixels[0, 0] < 1 or pixels.unique().numel() == 1:
            mixed.append(kept)
            torch.testing.assert_close(pixels, torch.full_like(pixels, 1 - kept))
        else:
            cut.append(kept)
            assert 1 - pixels.mean().item() == pytest.approx(kept, abs=1e-6)
    assert stats.binomtest(len(cut), 1500, 0.5).pvalue > 0.01
    assert stats.kstest(mixed, stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    assert stats.kstest(mixed, stats.beta(0.5, 0.5).cdf).pvalue < 0.01
    assert stats.kstest(cut, clipped_cutmix_shares()).pvalue > 0.01


def clipped_cutmix_shares() -> Float[np.ndarray, " n"]:
    """Shares that CutMix keeps by its paper: Beta(1, 1) for the box, its centre anywhere, cut off at the borders."""
    numbers = np.random.default_rng(1)
    side = np.sqrt(1 - numbers.beta(1.0, 1.0, 20_000))
    x, y = numbers.uniform(size=(2, 20_000))
    low, high = (lambda c: np.clip(c - side / 2, 0, 1)), (lambda c: np.clip(c + side / 2, 0, 1))
    return 1 - (high(x) - low(x)) * (high(y) - low(y))


@pytest.mark.parametrize("size", [16, 64])
def test_the_first_loss_is_ln_2(size: int) -> None:
    _, classify = objective(MixConfig(), BCE, embed_dim=size, layer_scale=1e-4)
    assert classify.step(batch())["loss"].item() == pytest.approx(math.log(2), abs=0.02)


def test_weights_start_as_in_deit_iii() -> None:
    model = VisionTransformer(find("deit3_s16_reg4").model.model_copy(update={"depth": 2, "num_classes": 1000}))
    spread = {"head.weight", "cls", "registers.tokens"} | {
        name for name, value in model.named_parameters() if value.ndim > 1 and "patch_embed" not in name
    }
    for name, value in model.named_parameters():
        if name in spread:
            assert value.std().item() == pytest.approx(0.02, rel=0.15 if value.numel() < 2000 else 0.01), name
            assert abs(value.mean().item()) < 0.1 * 0.02, name
        elif "patch_embed" in name:  # torch's default for a convolution: uniform within 1 / sqrt(inputs)
            assert value.abs().max().item() == pytest.approx(768**-0.5, rel=0.02), name
            assert value.std().item() == pytest.approx(768**-0.5 / 3**0.5, rel=0.1), name
        elif "scale" in name or "gamma" in name:
            assert torch.equal(value, torch.full_like(value, 1e-4)), name
        else:
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight")))), name


def test_every_block_drops_branches_alike() -> None:
    model = VisionTransformer(find("deit3_b16").model.model_copy(update={"embed_dim": 24, "depth": 5}))
    rates = [module.probability for module in model.modules() if type(module).__name__ == "DropPath"]
    assert rates == [0.2] * len(rates)
    assert len(rates) >= 5


def test_gradients_are_those_of_the_loss() -> None:
    model, classify = objective(NONE, BCE)
    one = batch()
    classify.step(one)
    ours = model.head.weight.grad.clone()
    model.zero_grad()
    F.binary_cross_entropy_with_logits(model.classify(one.images), F.one_hot(one.labels, 5).float()).backward()
    torch.testing.assert_close(ours, model.head.weight.grad)


def test_training_learns_a_batch_by_heart() -> None:
    model, classify = objective(NONE, BCE, layer_scale=1e-4)
    optimizer, one, losses = make_optimizer(model, OptimConfig(name="adamw", lr=1e-2)), batch(), []
    for _ in range(60):
        losses.append(classify.step(one)["loss"].item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 4


def test_drop_path_is_active_even_after_an_evaluation() -> None:
    model, classify = objective(NONE, BCE, drop_path=0.9, layer_scale=1.0)
    one = batch()
    model.eval()
    losses = {round(classify.step(one)["loss"].item(), 6) for _ in range(8)}
    assert model.training
    assert len(losses) > 1


def test_registers_get_gradients_of_their_own() -> None:
    model, classify = objective(NONE, BCE, registers=3, layer_scale=1.0)
    classify.step(batch())
    gradients = model.registers.tokens.grad
    assert gradients.norm(dim=1).min() > 0
    assert not torch.allclose(gradients[0], gradients[1])
    assert not torch.allclose(gradients[1], gradients[2])
