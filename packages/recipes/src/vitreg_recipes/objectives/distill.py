"""Self-distilled registers: a model with registers learns its own features without the artifacts (2505.21501)."""

from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from vitreg_core.denoise import averaged_features, draw_views
from vitreg_core.vit import VisionTransformer

from vitreg_recipes.distill.config import DistillConfig
from vitreg_recipes.distill.data import Pixels


class Tokens(nn.Module):
    """Class token, if there is one, and patches through `forward`, the only method that data parallelism sees."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(
        self, images: Float[Tensor, "b 3 height width"]
    ) -> tuple[Float[Tensor, "b d"] | None, Float[Tensor, "b p d"]]:
        """Class token and patches after the final norm."""
        found = self.vit(images)
        return found.cls, found.patches


class Distill:
    """A frozen teacher, whose patches are averaged over shifts that are new in every step, and a student."""

    def __init__(
        self, network: nn.Module, teacher: VisionTransformer, accelerator: Accelerator, config: DistillConfig
    ) -> None:
        self.network = network
        self.teacher = teacher
        self.accelerator = accelerator
        self.config = config
        self.done = 0
        """Optimizer steps done, which fix the shifts of the next one."""

    def step(self, batch: Pixels) -> dict[str, Tensor]:
        """Run forward and backward.

        Returns:
            `loss`, its weighted terms, and the mean cosine of the patches to the teacher's.
        """
        self.network.train()
        wanted_cls, wanted, seen = self.targets(batch.images)
        cls, patches = self.network(batch.images)
        terms = {"patches": self.config.loss.patches * distance(patches[:, seen], wanted[:, seen])}
        if cls is not None and wanted_cls is not None and self.config.loss.cls:
            terms["cls"] = self.config.loss.cls * distance(cls, wanted_cls)
        loss = torch.stack(list(terms.values())).sum()
        self.accelerator.backward(loss)
        cosine = F.cosine_similarity(patches[:, seen].float(), wanted[:, seen].float(), dim=-1).mean()
        return {name: value.detach() for name, value in {**terms, "loss": loss, "cosine": cosine}.items()}

    @torch.no_grad()
    def targets(
        self, images: Float[Tensor, "b 3 height width"]
    ) -> tuple[Float[Tensor, "b d"] | None, Float[Tensor, "b p d"], Tensor]:
        """The teacher's class token of the images, its patches averaged over views, and which patches a view saw."""
        shift = self.config.teacher
        height, width = images.shape[-2:]
        grid = (height // self.teacher.patch_size, width // self.teacher.patch_size)
        seed = (self.config.seed, self.done)
        views = draw_views(grid, shift.shifts, share=shift.share, flips=shift.flips, seed=seed)
        with self.accelerator.autocast():
            cls = self.teacher(images).cls if self.config.loss.cls else None
            patches, seen = averaged_features(self.teacher, images, views)
        return cls, patches, seen > 0

    def clip(self) -> None:
        """Nothing: few parameters move, from where they were trained to."""

    def after_step(self) -> None:
        """Count the step."""
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        """Steps done."""
        return {"done": self.done}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.done = values["done"]


def distance(ours: Float[Tensor, "*tokens d"], theirs: Float[Tensor, "*tokens d"]) -> Float[Tensor, ""]:
    """1 - cosine plus mean squared error, averaged over tokens."""
    ours, theirs = ours.float(), theirs.float()
    return (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean() + F.mse_loss(ours, theirs)
