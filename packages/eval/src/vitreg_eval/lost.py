"""LOST: one box per image from patch features alone (Simeoni et al. 2021, section 3).

Background patches agree with many others, so the patch that agrees with the fewest is taken for part of an object.
Patches like it vote for the rest of the object, and the connected part around the seed gives the box.
Similarities are dot products: real values are summed, and a pair is similar when its value is strictly positive.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor
from vitreg_core.errors import InputError

BLOCK_ROWS = 200  # of the Gram matrix at a time: fast on CPU, and memory stays at 200 x p

Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Discovery:
    """The object found in one image, and how it was found. All tensors are on the CPU."""

    box: Box
    """x0, y0, x1, y1 in pixels, half-open; the whole image when the search failed."""
    seed: int
    """Flat index, row by row, of the patch with the lowest degree (the first of equals)."""
    similar: int
    """How many of the candidate patches vote for the mask: those similar to the seed, itself included."""
    degrees: Int[Tensor, "rows cols"]
    """How many other patches each patch is similar to, 0 to p - 1."""
    mask: Bool[Tensor, "rows cols"]
    """Patches whose summed similarity to the voters is positive."""
    component: Bool[Tensor, "rows cols"]
    """The part of the mask that is connected to the seed (4 neighbours); empty when the search failed."""
    full_image: bool
    """Whether the box spans the whole patch grid."""
    failed: bool
    """Whether the seed is outside its own mask (zero features, or a bias below all similarities): count a miss."""

    @property
    def degree(self) -> int:
        """Degree of the seed."""
        return int(self.degrees.flatten()[self.seed])

    @property
    def degree_share(self) -> float:
        """Degree of the seed over the number of patches, 0 to 1."""
        return self.degree / self.degrees.numel()

    @property
    def mask_share(self) -> float:
        """Area of the mask over that of the image, in patches, 0 to 1."""
        return self.mask.double().mean().item()

    @property
    def component_share(self) -> float:
        """Area of the object over that of the image, in patches, 0 to 1."""
        return self.component.double().mean().item()

    @property
    def seed_on_border(self) -> bool:
        """Whether the seed touches the border of the image, as it often does when features carry no object."""
        rows, cols = self.degrees.shape
        row, col = divmod(self.seed, cols)
        return row in (0, rows - 1) or col in (0, cols - 1)


@torch.no_grad()
def discover(
    features: Float[Tensor, "p d"],
    grid: tuple[int, int],
    patch_size: int,
    image_size: tuple[int, int],
    *,
    k_patches: int = 100,
    bias: float = 0.0,
    center: bool = False,
    normalize: bool = False,
) -> Discovery:
    """Find one object from the patch features of one image (LOST, Simeoni et al. 2021, section 3).

    The defaults are LOST's own. The bias is what the register paper adds to the Gram matrix (Darcet et al. 2024,
    appendix): the negative of a similarity threshold, in the units of the features after centring and normalising.

    Args:
        features: patch tokens row by row, without class token and registers; computed in float32 or better.
        grid: rows and columns of patches.
        patch_size: side of a patch in pixels.
        image_size: height and width in pixels before padding; the box stays inside.
        k_patches: how many patches of lowest degree may vote, at least 1; a count, whatever the grid.
        bias: added to every similarity.
        center: subtract the mean patch first.
        normalize: scale every patch to unit length, after centring.

    Raises:
        InputError: features that are not finite, a grid that fits neither features nor image, or no candidates.
    """
    check_sizes(len(features), grid, patch_size, image_size)
    check_values(features, k_patches)
    with full_precision(features.device.type):
        tokens = prepare(features, center=center, normalize=normalize)
        degrees = count_similar(tokens, bias)
        candidates = degrees.argsort(stable=True)[:k_patches]
        voters = candidates[tokens[candidates] @ tokens[candidates[0]] > -bias]
        votes = tokens @ tokens[voters].sum(dim=0) + len(voters) * bias
    seed = int(candidates[0])
    mask = (votes > 0).reshape(grid).cpu().numpy()
    component = component_at(mask, seed)
    everywhere = box_around(np.ones(grid, dtype=bool), patch_size, image_size)
    failed = not component.any()
    box = everywhere if failed else box_around(component, patch_size, image_size)
    return Discovery(
        box=box,
        seed=seed,
        similar=len(voters),
        degrees=degrees.reshape(grid).cpu(),
        mask=torch.from_numpy(mask),
        component=torch.from_numpy(component),
        full_image=box == everywhere,
        failed=failed,
    )


def check_sizes(patches: int, grid: tuple[int, int], patch_size: int, image_size: tuple[int, int]) -> None:
    """Refuse a grid that does not fit, swapped rows and columns above all: square images would hide them."""
    rows, cols = grid
    if rows * cols != patches or patches == 0:
        raise InputError(
            f"{patches} patch features for a grid of {rows} x {cols}; drop class token and registers, keep every patch"
        )
    if patch_size < 1 or any(
        not pixels // patch_size <= count <= -(-pixels // patch_size)
        for count, pixels in zip(grid, image_size, strict=True)
    ):
        raise InputError(
            f"a grid of {rows} x {cols} patches of {patch_size} pixels does not fit an image of {image_size[0]} x "
            f"{image_size[1]}; give the grid as (rows, columns) and the image as (height, width) before padding"
        )


def check_values(features: Float[Tensor, "p d"], k_patches: int) -> None:
    """Refuse features that cannot be compared, and a search without candidates."""
    if k_patches < 1:
        raise InputError(f"k_patches={k_patches}: LOST needs at least 1 candidate patch; the paper takes 100")
    if features.sum().isfinite():
        return  # a sum forgets neither nan nor inf, and is ten times as fast as asking every value
    broken = (~features.isfinite().all(dim=1)).nonzero()
    if len(broken):
        raise InputError(
            f"features of {len(broken)} of {len(features)} patches are not finite (first: patch {int(broken[0])}); "
            "run the model in fp32, or check its weights"
        )


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Keep products of float32 matrices float32: TF32 and autocast flip signs near 0, and with them boxes."""
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def prepare(features: Float[Tensor, "p d"], *, center: bool, normalize: bool) -> Float[Tensor, "p d"]:
    """Cast up to float32, centre, then scale to unit length."""
    tokens = features.to(torch.promote_types(features.dtype, torch.float32))
    if center:
        tokens = tokens - tokens.mean(dim=0)
    return F.normalize(tokens, dim=1, eps=1e-12) if normalize else tokens


def count_similar(tokens: Float[Tensor, "p d"], bias: float) -> Int[Tensor, " p"]:
    """Count for each patch the others whose dot product with it exceeds -bias.

    Similarity is symmetric, so only blocks on and above the diagonal are computed; each counts for rows and columns.
    """
    degrees = torch.zeros(len(tokens), dtype=torch.int32, device=tokens.device)
    for start in range(0, len(tokens), BLOCK_ROWS):
        block = tokens[start : start + BLOCK_ROWS]
        similar = (block @ tokens[start:].T > -bias).fill_diagonal_(False).view(torch.uint8)  # noqa: FBT003
        end = start + len(block)
        degrees[start:end] += similar.sum(dim=1, dtype=torch.int32)
        degrees[end:] += similar[:, len(block) :].sum(dim=0, dtype=torch.int32)
    return degrees


def component_at(mask: Bool[np.ndarray, "rows cols"], seed: int) -> Bool[np.ndarray, "rows cols"]:
    """Part of the mask connected to the seed by sides, not corners; empty when the seed is not in the mask."""
    labels, _ = ndimage.label(mask)
    return mask & (labels == labels.flat[seed])


def box_around(component: Bool[np.ndarray, "rows cols"], patch_size: int, image_size: tuple[int, int]) -> Box:
    """Pixels x0, y0, x1, y1, half-open, of the patches that are true, cut at the image."""
    rows = np.flatnonzero(component.any(axis=1))
    cols = np.flatnonzero(component.any(axis=0))
    height, width = image_size
    right, bottom = int(cols[-1] + 1) * patch_size, int(rows[-1] + 1) * patch_size
    return int(cols[0]) * patch_size, int(rows[0]) * patch_size, min(right, width), min(bottom, height)
