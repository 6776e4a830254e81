"""A semantic segmentation head on frozen patch tokens, with vitreg-core alone.

    python examples/segmentation_head.py [SOURCE]

SOURCE is any model that `load_model` reads. The data are drawn scenes: 0 is the ground, 1 to 6 are textures of objects.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vitreg_core import VisionTransformer, load_model
from vitreg_core.data.scenes import TEXTURES, draw_scenes

BATCH, STEPS, TEST = 8, 40, 64
CLASSES = len(TEXTURES) + 1


class SegmentationHead(nn.Module):
    """Batch norm and one linear layer on every patch token, then a resize to the pixels."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(embed_dim), nn.Conv2d(embed_dim, CLASSES, kernel_size=1))

    def forward(self, patch_map: Tensor, size: torch.Size) -> Tensor:
        """Logits of every pixel."""
        return F.interpolate(self.layers(patch_map), size=size, mode="bilinear")


def read(model: VisionTransformer, count: int, seed: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Feature maps of freshly drawn scenes, and their masks."""
    scenes = draw_scenes(count, seed, image_size=model.preprocess.config.image_size)
    with torch.inference_mode():
        maps = model(model.preprocess.normalize(scenes.image)).patch_map
    return maps.clone(), scenes.mask  # a clone may be trained on, which what inference mode gives may not


def mean_iou(found: Tensor, mask: Tensor) -> float:
    """Mean over the classes of intersection over union, of all pixels together."""
    pairs = [(found == index, mask == index) for index in range(CLASSES)]
    return sum(float((a & b).sum() / (a | b).sum().clamp(min=1)) for a, b in pairs) / CLASSES


if __name__ == "__main__":
    model = load_model(sys.argv[1] if len(sys.argv) > 1 else "vit_ti16_reg4").eval()
    torch.manual_seed(0)
    head = SegmentationHead(model.embed_dim)
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    for step in range(STEPS):
        maps, mask = read(model, BATCH, (0, step))
        optimizer.zero_grad()
        F.cross_entropy(head(maps, mask.shape[1:]), mask).backward()
        optimizer.step()
    maps, mask = read(model, TEST, (1, 0))
    found = head.eval()(maps, mask.shape[1:]).argmax(dim=1)
    print(f"{model.source}: mIoU {mean_iou(found, mask):.3f} on {TEST} other scenes")
    print(f"all ground: {mean_iou(torch.zeros_like(mask), mask):.3f}")
