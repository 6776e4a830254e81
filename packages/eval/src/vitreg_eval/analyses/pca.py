"""Principal components of patch tokens, as colours."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def pca_maps(patches: Float[Tensor, "b p d"], grid: tuple[int, int]) -> Float[Tensor, "b rows cols 3"]:
    """First three principal components of all patches together, 1st to 99th percentile of each scaled to 0..1.

    The sign of a component is fixed: its largest loading in magnitude is positive.
    """
    flat = rearrange(patches, "b p d -> (b p) d").double()
    centred = flat - flat.mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    top = vectors[:, -3:].flip(-1)
    signs = top.gather(0, top.abs().argmax(dim=0, keepdim=True)).sign()
    components = centred @ (top * signs)
    low, high = components.quantile(0.01, dim=0), components.quantile(0.99, dim=0)
    scaled = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    return rearrange(scaled, "(b rows cols) c -> b rows cols c", b=len(patches), rows=grid[0], cols=grid[1])
