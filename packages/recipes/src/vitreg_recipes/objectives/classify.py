"""Classification as in DeiT-III: images mixed in pairs, and a binary cross-entropy per class."""

from typing import Any

from accelerate import Accelerator
from jaxtyping import Float
from timm.data.mixup import Mixup, mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from vitreg_core.vit import VisionTransformer

from vitreg_recipes.config import LossConfig, MixConfig
from vitreg_recipes.data import Batch


class Classifier(nn.Module):
    """Logits through `forward`, the only method that data parallelism and autocast see."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b classes"]:
        """Logits of the head on the class token."""
        return self.vit.classify(images)


class Classify:
    """The DeiT-III signal (DeiT III, section 3) on a prepared network."""

    def __init__(
        self, network: nn.Module, accelerator: Accelerator, num_classes: int, mix: MixConfig, loss: LossConfig
    ) -> None:
        self.network = network
        self.accelerator = accelerator
        self.num_classes = num_classes
        self.smoothing = loss.smoothing
        self.mixup = make_mixup(mix, loss.smoothing, num_classes) if mix.active else None
        self.criterion = make_criterion(loss)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Run forward and backward on a mixed batch, with drop path active.

        Returns:
            `loss`, without gradient.
        """
        self.network.train()
        images, targets = self.mix(batch)
        loss = self.criterion(self.network(images), targets)
        self.accelerator.backward(loss)
        return {"loss": loss.detach()}

    def clip(self) -> None:
        """Nothing: LAMB clips inside, and DeiT-III's AdamW does not clip."""

    def after_step(self) -> None:
        """Nothing follows a step."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: mixing draws from NumPy's generator, which the checkpoint keeps."""
        return {}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Nothing to take back."""

    def mix(self, batch: Batch) -> tuple[Float[Tensor, "b 3 height width"], Float[Tensor, "b classes"]]:
        """Images, each mixed with the one as far from the other end of the batch, and soft targets."""
        if self.mixup is not None:
            return self.mixup(batch.images, batch.labels)
        return batch.images, mixup_target(batch.labels, self.num_classes, smoothing=self.smoothing)


def make_mixup(mix: MixConfig, smoothing: float, num_classes: int) -> Mixup:
    """Mixup and CutMix as in DeiT-III: one of the two per batch, each as likely where both are on."""
    return Mixup(mix.mixup, mix.cutmix, label_smoothing=smoothing, num_classes=num_classes)


def make_criterion(loss: LossConfig) -> nn.Module:
    """BCE counts every class in the mix as fully there (DeiT-III drops lambda); CE takes the soft targets."""
    return BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0) if loss.name == "bce" else SoftTargetCrossEntropy()
