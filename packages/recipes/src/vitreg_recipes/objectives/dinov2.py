"""DINOv2's signal: a student learns what its teacher says of other crops, and of patches that it does not see."""

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from vitreg_core.vit import VisionTransformer

from vitreg_recipes.dinov2.config import DinoConfig
from vitreg_recipes.dinov2.crops import Crops
from vitreg_recipes.dinov2.losses import dino_loss, gram_loss, ibot_loss, koleo_loss, masked_weights
from vitreg_recipes.dinov2.networks import Judged, Student, Teacher
from vitreg_recipes.dinov2.schedules import line, momentum
from vitreg_recipes.dinov2.targets import Center, SinkhornKnopp


class Networks(NamedTuple):
    """The networks of a run, as they are kept in checkpoints."""

    student: Student
    """What is trained."""
    teacher: Teacher
    """What gives the targets."""
    average: Teacher
    """The moving average of the student; the teacher itself, unless that is another model, which is distilled."""
    anchor: VisionTransformer | None
    """What Gram anchoring holds the patches to: the backbone of the start."""


class Dinov2:
    """Student and teacher with their losses (DINOv2, section 4).

    With `accumulate`, centring, Sinkhorn-Knopp and KoLeo act within each part of a batch, as on a
    smaller one.
    """

    def __init__(
        self, network: nn.Module, networks: Networks, accelerator: Accelerator, config: DinoConfig, steps: int
    ) -> None:
        """Take the student as it was prepared for several processes, and all networks as they are."""
        self.network = network
        self.student, self.teacher, self.average, self.anchor = networks
        self.accelerator = accelerator
        self.config = config
        self.steps = steps
        self.done = 0
        """Optimizer steps done."""
        sinkhorn = config.loss.centering == "sinkhorn"
        patch_head = config.head if config.ibot_head is None else config.ibot_head
        device = accelerator.device
        self.cls_targets = (SinkhornKnopp() if sinkhorn else Center(config.head.prototypes)).to(device)
        self.patch_targets = (SinkhornKnopp() if sinkhorn else Center(patch_head.prototypes)).to(device)

    def step(self, batch: Crops) -> dict[str, Tensor]:
        """Run forward and backward.

        Returns:
            Every term of the loss as it counts in it, `loss`, and two signs of a collapse: the mean entropy of the
            teacher's targets (0 where one prototype takes all, log of their number where all are alike), and the
            effective rank of the class tokens of the batch (1 where all are alike).
        """
        self.network.train()
        masked, weights = masked_weights(batch.masks)
        cls, patches, features = self.targets(batch, masked)
        judged = self.network(batch, masked)
        terms = self.terms(batch, judged, cls, patches, weights)
        loss = torch.stack(list(terms.values())).sum()
        self.accelerator.backward(loss)
        entropy = -(cls * cls.clamp_min(1e-12).log()).sum(dim=-1).mean()
        told = {**terms, "loss": loss, "target_entropy": entropy, "feature_rank": effective_rank(features)}
        return {name: value.detach() for name, value in told.items()}

    @torch.no_grad()
    def targets(
        self, batch: Crops, masked: Int[Tensor, " m"]
    ) -> tuple[Float[Tensor, "2 b k"], Float[Tensor, "m k2"], Float[Tensor, "b2 d"]]:
        """What the teacher says of the unmasked global crops and of the masked patches, and its features."""
        with self.accelerator.autocast():
            cls_logits, patch_logits, features = self.teacher(batch.global_crops, masked)
        temperature = line(self.done, self.config.teacher.temperature_steps, *self.config.teacher.temperature)
        cls = self.cls_targets(cls_logits, temperature).unflatten(0, (2, -1))
        return cls, self.patch_targets(patch_logits, temperature), features.float()

    def terms(
        self,
        batch: Crops,
        judged: Judged,
        cls: Float[Tensor, "2 b k"],
        patches: Float[Tensor, "m k2"],
        weights: Float[Tensor, " m"],
    ) -> dict[str, Tensor]:
        """The terms of the loss, weighted; those without a weight are left out."""
        loss = self.config.loss
        terms: dict[str, Tensor] = {}
        if loss.dino:
            local, crossed = dino_loss(cls, judged.global_logits, judged.local_logits)
            terms |= {"dino_local": loss.dino * local, "dino_global": loss.dino * crossed}
        if loss.koleo:
            terms["koleo"] = loss.koleo * (koleo_loss(judged.cls[0]) + koleo_loss(judged.cls[1]))
        if loss.ibot:
            terms["ibot"] = loss.ibot * ibot_loss(patches, judged.patch_logits, weights, len(batch.global_crops))
        if self.anchor is not None:
            with torch.no_grad(), self.accelerator.autocast():
                anchor = self.anchor(batch.global_crops).patches
            terms["gram"] = loss.gram * gram_loss(judged.patches, anchor)
        return terms

    def clip(self) -> None:
        """Clip the gradient of the backbone, and that of each head."""
        for part in self.student.children():
            clip_grad_norm_(part.parameters(), self.config.optim.clip)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average, as a rule the teacher, towards the student."""
        kept = momentum(self.done, self.steps, self.config.teacher.momentum)
        self.done += 1
        if kept < 1:
            theirs: list[Tensor] = list(self.average.parameters())
            ours: list[Tensor] = list(self.student.parameters())
            torch._foreach_lerp_(theirs, ours, weight=1.0 - kept)

    def state_dict(self) -> dict[str, Any]:
        """Steps done and the centres."""
        return {
            "done": self.done,
            "cls_targets": self.cls_targets.state_dict(),
            "patch_targets": self.patch_targets.state_dict(),
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.done = values["done"]
        self.cls_targets.load_state_dict(values["cls_targets"])
        self.patch_targets.load_state_dict(values["patch_targets"])


def effective_rank(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Directions over which features spread: of the covariance, (sum of eigenvalues)^2 over the sum of squares."""
    centred = features - features.mean(dim=0)
    gram = centred @ centred.T
    return gram.trace().square() / gram.square().sum().clamp_min(1e-30)
