import math

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from vitreg_core import VisionTransformer, ViTConfig
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


def test_the_first_loss_is_ln_2() -> None:
    _, classify = objective(MixConfig(), BCE)
    assert abs(classify.step(batch())["loss"].item() - math.log(2)) < 0.03


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
