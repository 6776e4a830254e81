"""Images to patch tokens, and the positions that are added to them."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_core.config import ViTConfig
from vitreg_core.errors import InputError


class PatchEmbed(nn.Module):
    """One linear map of every patch; pixels beyond the last whole patch are dropped."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, images: Float[Tensor, "b 3 height width"]) -> tuple[int, int]:
        """Rows and columns of whole patches in the images.

        Raises:
            InputError: the images are smaller than one patch.
        """
        height, width = images.shape[-2:]
        if min(height, width) < self.patch_size:
            raise InputError(
                f"image of {height}x{width} pixels is smaller than one patch of {self.patch_size}; give larger images"
            )
        return height // self.patch_size, width // self.patch_size

    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b p d"]:
        """Embed the patches, row by row."""
        return rearrange(self.proj(images), "b d rows cols -> b (rows cols) d")


def resize_positions(
    positions: Float[Tensor, "p d"],
    native: tuple[int, int],
    grid: tuple[int, int],
    *,
    antialias: bool,
    offset: float,
) -> Float[Tensor, "q d"]:
    """Resize position vectors from their native grid to another one, bicubically, in float32.

    `offset` 0 resizes to the grid itself, as timm, transformers and DINOv2 with registers do; otherwise the scale is
    `(grid + offset) / native`, which stretches the sampling grid a little, as DINOv2 without registers does (0.1).
    `antialias` low-pass filters when the grid shrinks (registers paper, appendix A).
    """
    if grid == native:
        return positions
    rows, cols = native
    table = rearrange(positions.float(), "(rows cols) d -> 1 d rows cols", rows=rows, cols=cols)
    if offset:
        scale = [(grid[0] + offset) / rows, (grid[1] + offset) / cols]
        resized = F.interpolate(table, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        resized = F.interpolate(table, size=grid, mode="bicubic", antialias=antialias)
    return rearrange(resized, "1 d rows cols -> (rows cols) d").to(positions.dtype)


class Positions(nn.Module):
    """Learned position vectors of the patches, and of the class token where the model has one for it."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.native = config.grid
        self.antialias = config.position_antialias
        self.offset = config.position_offset
        rows, cols = config.grid
        self.patches = nn.Parameter(torch.empty(rows * cols, config.embed_dim))  # p d
        self.cls = nn.Parameter(torch.empty(config.embed_dim)) if config.class_position else None  # d
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "p d"]:
        """Position vectors of the patches of a grid of this size."""
        return resize_positions(self.patches, self.native, grid, antialias=self.antialias, offset=self.offset)
