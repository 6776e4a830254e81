"""Where new registers start: as copies of the patches that hold the outliers, whose part they are to play."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.outliers import find_outliers
from vitreg_core.vit import VisionTransformer

IMAGES = 64
"""Images that are looked at; enough for the mixture rule of find_outliers from 7 x 7 patches on."""
CHUNK = 16
"""Images that pass the model at a time."""
FIXED = 0.5
"""Share of the images from which on a place counts as one that holds outliers by itself, whatever it shows."""


@torch.no_grad()
def seed_registers(model: VisionTransformer, images: Float[Tensor, "b 3 height width"], old: int) -> bool:
    """Start the registers behind the first `old` ones as what the blocks read of outlier patches; in place.

    Places that hold outliers whatever they show get a register each, the most frequent ones first, and take the mean
    position of their neighbours, so that what made them outliers is the registers' alone. Without such places one
    register takes the mean of all outliers. What the registers held before is added; the others keep just that.

    Args:
        model: with learned positions of the grid of the images, or without any.
        images: normalised pixels, like those to train on.
        old: registers that keep what they are.

    Returns:
        Whether there are outliers; nothing is changed otherwise.
    """
    reads = torch.cat([read(model, chunk) for chunk in images.split(CHUNK)])
    layers = [model.intermediate(chunk, [-1], norm=False)[0] for chunk in images.split(CHUNK)]
    outliers = find_outliers(torch.cat([layer.patches.float().norm(dim=-1) for layer in layers]))
    if not outliers.found:
        return False
    shares = outliers.mask.float().mean(dim=0)
    places = shares.argsort(descending=True)[: int((shares > FIXED).sum())]
    groups = [reads[outliers.mask[:, place], place] for place in places] or [reads[outliers.mask]]
    starts = torch.stack([group.mean(dim=0) for group in groups[: model.num_registers - old]])
    model.registers.tokens[old : old + len(starts)] += starts
    if model.positions is not None and len(places):
        model.positions.patches.copy_(smoothed(model.positions.patches, shares > FIXED, layers[0].grid))
    return True


def read(model: VisionTransformer, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b p d"]:
    """Patches with their positions, as they join class token and registers."""
    patches = model.embeddings(images)
    return patches if model.positions is None else patches + model.positions(model.patch_embed.grid(images))


def smoothed(
    positions: Float[Tensor, "p d"], places: Bool[Tensor, " p"], grid: tuple[int, int]
) -> Float[Tensor, "p d"]:
    """Positions, with those of some places replaced by the mean of their neighbours, corners included, that stay."""
    rows, cols = grid
    kept = rearrange(~places, "(rows cols) -> 1 1 rows cols", rows=rows, cols=cols).to(positions.dtype)
    values = rearrange(positions, "(rows cols) d -> 1 d rows cols", rows=rows, cols=cols) * kept
    around = F.avg_pool2d(kept, 3, stride=1, padding=1)
    means = F.avg_pool2d(values, 3, stride=1, padding=1) / around.clamp(min=1e-6)
    replaced = torch.where((kept == 0) & (around > 0), means, values)
    flat = rearrange(replaced, "1 d rows cols -> (rows cols) d")
    return torch.where((places & (flat.abs().sum(dim=1) > 0))[:, None], flat, positions)
