"""Student and teacher: a backbone with one head for class tokens, and perhaps one of its own for patches."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from vitreg_core.vit import VisionTransformer

from vitreg_recipes.dinov2.config import DinoConfig, DinoHeadConfig
from vitreg_recipes.dinov2.crops import Crops
from vitreg_recipes.dinov2.head import DinoHead


class Judged(NamedTuple):
    """What the student says of a batch of crops."""

    global_logits: Float[Tensor, "2 b k"]
    """Of the class tokens of the two global crops."""
    local_logits: Float[Tensor, "crops b k"]
    """Of the class tokens of the local crops."""
    patch_logits: Float[Tensor, "m k2"]
    """Of the masked patches."""
    cls: Float[Tensor, "2 b d"]
    """Class tokens of the global crops, after the final norm."""
    patches: Float[Tensor, "b2 p d"]
    """Patch tokens of the global crops, after the final norm."""


class Network(nn.Module):
    """A backbone with its heads. One that is distilled from a larger model sees all patches, as its teacher does."""

    def __init__(self, backbone: VisionTransformer, config: DinoConfig) -> None:
        super().__init__()
        self.hides = config.masks
        self.backbone = backbone
        self.dino_head = make_head(backbone.embed_dim, config.head)
        self.ibot_head = None if config.ibot_head is None else make_head(backbone.embed_dim, config.ibot_head)

    def patch_head(self, patches: Float[Tensor, "m d"]) -> Float[Tensor, "m k2"]:
        """Logits of patches."""
        return (self.dino_head if self.ibot_head is None else self.ibot_head)(patches)


class Student(Network):
    """What is trained. One forward pass for everything, as data parallelism and autocast see no other method."""

    def forward(self, crops: Crops, masked: Int[Tensor, " m"]) -> Judged:
        """Judge all crops in one packed pass.

        Args:
            crops: global crops with masks, and local ones.
            masked: flat positions of the masked patches.
        """
        batches = [crops.global_crops, crops.local_crops] if len(crops.local_crops) else [crops.global_crops]
        hidden = crops.masks if self.hides else None
        found = self.backbone.packed(batches, [hidden, None][: len(batches)])
        cls = torch.cat([part.cls for part in found if part.cls is not None])
        logits = self.dino_head(cls)
        images = len(crops.global_crops) // 2
        by_crop = logits.unflatten(0, (-1, images))
        patches = found[0].patches
        return Judged(
            global_logits=by_crop[:2],
            local_logits=by_crop[2:],
            patch_logits=self.patch_head(patches.flatten(0, 1)[masked]),
            cls=cls[: 2 * images].unflatten(0, (2, images)),
            patches=patches,
        )


class Teacher(Network):
    """A moving average of the student, or a frozen model; it is never trained."""

    def forward(
        self, images: Float[Tensor, "b2 3 height width"], masked: Int[Tensor, " m"]
    ) -> tuple[Float[Tensor, "b2 k"], Float[Tensor, "m k2"], Float[Tensor, "b2 d"]]:
        """Logits of the class tokens and of the patches that the student does not see, and the class tokens."""
        found = self.backbone(images)
        assert found.cls is not None
        return self.dino_head(found.cls), self.patch_head(found.patches.flatten(0, 1)[masked]), found.cls


def make_head(embed_dim: int, config: DinoHeadConfig) -> DinoHead:
    """A head as the config says."""
    return DinoHead(
        embed_dim,
        prototypes=config.prototypes,
        hidden=config.hidden,
        bottleneck=config.bottleneck,
        layers=config.layers,
    )
