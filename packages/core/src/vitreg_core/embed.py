"""Images to patch tokens, and the positions that are added to them."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_core.attention import Rotation
from vitreg_core.config import ViTConfig
from vitreg_core.errors import InputError


class PatchEmbed(nn.Module):
    """One linear map of every patch; pixels beyond the last whole patch are dropped."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, config.patch_size, bias=config.patch_bias)

    def grid(self, images: Float[Tensor, "b 3 height width"]) -> tuple[int, int]:
        """Rows and columns of whole patches in the images.

        Raises:
            InputError: the images are smaller than one patch.
        """
        height, width = images.shape[-2:]
        if height < self.patch_size or width < self.patch_size:
            raise InputError(
                f"image of {height}x{width} pixels is smaller than one patch of {self.patch_size}; give larger images"
            )
        return height // self.patch_size, width // self.patch_size

    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b p d"]:
        """Embed the patches, row by row."""
        return rearrange(self.proj(images.to(self.proj.weight.dtype)), "b d rows cols -> b (rows cols) d")


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
    if torch.compiler.is_exporting():
        return resize_by_products(positions, native, grid, antialias=antialias, offset=offset)
    if grid == native:
        return positions
    table = positions.float().unflatten(0, native).movedim(2, 0)[None]  # 1 d rows cols
    if offset:
        scale = [(new + offset) / old for new, old in zip(grid, native, strict=True)]
        resized = F.interpolate(table, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        resized = F.interpolate(table, size=grid, mode="bicubic", antialias=antialias)
    return rearrange(resized, "1 d rows cols -> (rows cols) d").to(positions.dtype)


def resize_by_products(
    positions: Float[Tensor, "p d"],
    native: tuple[int, int],
    grid: tuple[int, int],
    *,
    antialias: bool,
    offset: float,
) -> Float[Tensor, "q d"]:
    """The same resize as one matrix product per side, which an exported program follows to any grid.

    At the native grid both matrices are the identity, bit by bit. Torch's antialiased kernel also leaves a side alone
    if its size stays the same.
    """
    target = torch.stack([torch.scalar_tensor(side, dtype=torch.float64) for side in grid])  # 2
    source = torch.tensor(native, dtype=torch.float64)  # 2
    same = target == source
    scales = (
        torch.where(same if antialias else same.all(), 1.0, source / (target + offset)).float().to(positions.device)
    )
    by_row, by_col = (
        cubic_weights(old, new, scale, antialias=antialias)
        for old, new, scale in zip(native, grid, scales.unbind(), strict=True)
    )
    table = positions.float().unflatten(0, native)  # rows cols d
    resized = by_col @ (by_row @ table.flatten(1)).unflatten(1, table.shape[1:])
    return resized.flatten(0, 1).to(positions.dtype)


def cubic_weights(old: int, new: int, scale: Float[Tensor, ""], *, antialias: bool) -> Float[Tensor, "new old"]:
    """How much each of `old` points on a side counts for each of `new` ones that lie `scale` apart (Keys 1981).

    Torch's two kernels: a = -0.75 where points beyond the border repeat the last one; with antialias a = -0.5, as wide
    as the points are apart, cut at the border.
    """
    sharpness, beyond = (-0.5, 0) if antialias else (-0.75, 2)
    points = torch.arange(-beyond, old + beyond, device=scale.device) + 0.5
    centres = (torch.arange(new, device=scale.device) + 0.5) * scale
    distance = (points - centres[:, None]).abs() / (scale.clamp(min=1) if antialias else 1)
    near = ((sharpness + 2) * distance - (sharpness + 3)) * distance**2 + 1
    far = sharpness * (((distance - 5) * distance + 8) * distance - 4)
    weights = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
    if beyond:
        nearest = torch.arange(-beyond, old + beyond, device=scale.device).clamp(0, old - 1)
        weights = weights.new_zeros(new, old).index_add(1, nearest, weights)
    return weights / weights.sum(dim=1, keepdim=True)


class Positions(nn.Module):
    """Learned position vectors of the patches, and of the class token where the model has one for it."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.native = config.grid
        self.antialias = config.position_antialias
        self.offset = config.position_offset
        rows, cols = config.grid
        self.patches = nn.Parameter(torch.zeros(rows * cols, config.embed_dim))  # p d
        self.cls = nn.Parameter(torch.zeros(config.embed_dim)) if config.class_position else None  # d

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "p d"]:
        """Position vectors of the patches of a grid of this size."""
        return resize_positions(self.patches, self.native, grid, antialias=self.antialias, offset=self.offset)


class RotaryPositions(nn.Module):
    """Rotation of queries and keys by where a patch lies in the image (RoPE, as in DINOv3); it learns nothing.

    Centres of patches run from -1 to 1 along each side. Half of the channel pairs of a head turn with the row, half
    with the column, from one turn per side down to one in `rope_base` of it.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.base = config.rope_base
        self.head_dim = config.head_dim
        self.prefix = len(config.prefix)

    def forward(self, grid: tuple[int, int], device: torch.device) -> Rotation:
        """Rotation of every token of an image; prefix tokens are left as they are."""
        quarter = self.head_dim // 4
        exponents = 2 * torch.arange(quarter, device=device, dtype=torch.float32) / (self.head_dim // 2)
        rows, cols = (2 * (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side - 1 for side in grid)
        centres = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1).flatten(0, 1)  # p 2
        angles = 2 * torch.pi * centres[:, :, None] / self.base**exponents
        angles = F.pad(angles.flatten(1), (0, 0, self.prefix, 0)).tile(2)  # n k; an angle of 0 turns nothing
        return Rotation(angles.cos(), angles.sin())
