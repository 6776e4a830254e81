"""LOST: one box per image from patch features alone (Simeoni et al. 2021, section 3).

Background patches agree with many others, so the patch that agrees with the fewest is taken for part of an object.
Patches like it vote for the rest of the object, and the connected part around the seed gives the box.
Similarities are dot products: real values are summed, and a pair is similar when its value is strictly positive.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.discovery import Discovery, View, check_finite, check_sizes, located, view_features

BLOCK_ROWS = {"cpu": 128, "cuda": 1024}
"""Rows of the Gram matrix at a time. On CPU fewer slow the product down, and more waste work below the diagonal."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LostDiscovery(Discovery):
    """The object that LOST found, and how. A patch's score is the share of patches that it is not similar to."""

    degrees: Int[Tensor, "rows cols"]
    """How many other patches each patch is similar to, 0 to p - 1."""
    expansion: Int[Tensor, " voters"]
    """Flat indices of the patches that vote for the mask, by increasing degree, seed first: those of the candidates
    that are similar to the seed. Empty when the search failed."""

    @property
    def degree(self) -> int:
        """Degree of the seed."""
        return int(self.degrees.flatten()[self.seed])

    @property
    def degree_share(self) -> float:
        """Degree of the seed over the number of patches, 0 to 1."""
        return self.degree / self.degrees.numel()

    def diagnostics(self) -> dict[str, int | float | bool]:
        """As for every method, with the seed's degree and the size of its expansion."""
        return {
            **super().diagnostics(),
            "seed_degree_share": round(self.degree_share, 4),
            "expansion": len(self.expansion),
        }


@dataclass(frozen=True, eq=False)
class Expansion:
    """What the steps up to the mask found in each image of a batch, on the CPU."""

    degrees: Int[Tensor, "b p"]
    candidates: Int[Tensor, "b k"]
    """Patches of lowest degree, by increasing degree; the first is the seed."""
    joins: Bool[Tensor, "b k"]
    """Which candidates are similar to the seed."""
    mask: Bool[Tensor, "b p"]

    def discovery(
        self, image: int, grid: tuple[int, int], patch_size: int, image_size: tuple[int, int]
    ) -> LostDiscovery:
        """The box of one image of the batch."""
        degrees = self.degrees[image].reshape(grid)
        candidates = self.candidates[image]
        return LostDiscovery(
            score=1 - degrees / degrees.numel(),
            degrees=degrees,
            expansion=candidates[self.joins[image]],
            **located(self.mask[image].reshape(grid), int(candidates[0]), patch_size, image_size),
        )


def lost(
    view: View, *, k_patches: int = 100, center: bool = False, normalize: bool = False, bias: float = 0.0
) -> LostDiscovery:
    """LOST in one view; the settings are those of `discover`."""
    return discover(
        view_features(view),
        view.grid,
        view.patch_size,
        view.image_size,
        k_patches=k_patches,
        center=center,
        normalize=normalize,
        bias=bias,
    )


def discover(
    features: Float[Tensor, "p d"],
    grid: tuple[int, int],
    patch_size: int,
    image_size: tuple[int, int],
    *,
    k_patches: int = 100,
    center: bool = False,
    normalize: bool = False,
    bias: float = 0.0,
) -> LostDiscovery:
    """Find one object from the patch features of one image (LOST, Simeoni et al. 2021, section 3).

    The defaults are LOST's own. The bias is what the register paper adds to the Gram matrix (Darcet et al. 2024,
    appendix): the negative of a similarity threshold, in the units of the features after centring and normalising.

    Args:
        features: patch tokens row by row, without class token and registers; computed in float32 or better.
        grid: rows and columns of patches.
        patch_size: side of a patch in pixels.
        image_size: height and width in pixels before padding; the box stays inside.
        k_patches: how many patches of lowest degree may vote, at least 1; a count, whatever the grid.
        center: subtract the mean patch first.
        normalize: scale every patch to unit length, after centring.
        bias: added to every similarity.

    Raises:
        InputError: features that are not finite, a grid that fits neither features nor image, or no candidates.
    """
    [[discovery]] = discover_all(
        features[None],
        grid,
        patch_size,
        [image_size],
        k_patches=k_patches,
        center=center,
        normalize=normalize,
        biases=[bias],
    )
    return discovery


@torch.no_grad()
def discover_all(
    features: Float[Tensor, "b p d"],
    grid: tuple[int, int],
    patch_size: int,
    image_sizes: Sequence[tuple[int, int]],
    *,
    k_patches: int = 100,
    center: bool = False,
    normalize: bool = False,
    biases: Sequence[float] = (0.0,),
) -> list[list[LostDiscovery]]:
    """Find one object per image and per bias, in images of one grid; by image, then by bias.

    All biases share the Gram matrix, the costly part. Batches pay on a GPU only: on CPU, one image at a time is faster.

    Args:
        features: as for `discover`, of several images.
        grid: rows and columns of patches.
        patch_size: side of a patch in pixels.
        image_sizes: height and width of each image in pixels before padding.
        k_patches: as for `discover`, like the others below.
        center: subtract the mean patch of each image first.
        normalize: scale every patch to unit length, after centring.
        biases: added to every similarity, one after the other.

    Raises:
        InputError: as for `discover`.
    """
    if k_patches < 1:
        raise InputError(f"k_patches={k_patches}: LOST needs at least 1 candidate patch; the paper takes 100")
    if len(image_sizes) != len(features):
        raise InputError(
            f"{len(image_sizes)} image sizes for the features of {len(features)} images; give one for each"
        )
    for image_size in image_sizes:
        check_sizes(features.shape[1], grid, patch_size, image_size)
    with full_precision(features.device.type):
        tokens = prepare(features, center=center, normalize=normalize)
        expanded = [
            expand(tokens, degrees, bias, k_patches)
            for degrees, bias in zip(count_similar(tokens, biases), biases, strict=True)
        ]
    return [
        [expansion.discovery(image, grid, patch_size, image_size) for expansion in expanded]
        for image, image_size in enumerate(image_sizes)
    ]


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


def prepare(features: Float[Tensor, "b p d"], *, center: bool, normalize: bool) -> Float[Tensor, "b p d"]:
    """Cast up to float32, centre, then scale to unit length."""
    tokens = features.to(torch.promote_types(features.dtype, torch.float32))
    check_finite(tokens if len(tokens) > 1 else tokens[0])
    if center:
        tokens = tokens - tokens.mean(dim=1, keepdim=True)
    return F.normalize(tokens, dim=2, eps=1e-12) if normalize else tokens


def count_similar(tokens: Float[Tensor, "b p d"], biases: Sequence[float]) -> Int[Tensor, "biases b p"]:
    """Count for each patch the others whose dot product with it exceeds -bias.

    Similarity is symmetric, so only blocks on and above the diagonal are computed; each counts for rows and columns.
    Comparisons give 0.0 and 1.0, whose sums are exact up to 2^24: on CPU faster than truth values, and in place.
    """
    images, patches, _ = tokens.shape
    size = BLOCK_ROWS.get(tokens.device.type, BLOCK_ROWS["cuda"])
    degrees = tokens.new_zeros(len(biases), images, patches)
    buffer = tokens.new_empty(images * min(size, patches) * patches)
    for start in range(0, patches, size):
        rows, others = tokens[:, start : start + size], tokens[:, start:]
        shape = (images, rows.shape[1], others.shape[1])
        products = torch.bmm(rows, others.mT, out=buffer[: math.prod(shape)].view(shape))
        products.diagonal(dim1=1, dim2=2).fill_(-math.inf)
        end = start + shape[1]
        for index, bias in enumerate(biases):
            last = index + 1 == len(biases)
            similar = torch.gt(products, -bias, out=products if last else torch.empty_like(products))
            degrees[index, :, start:end] += similar.sum(dim=2)
            degrees[index, :, end:] += similar[:, :, shape[1] :].sum(dim=1)
    return degrees.int()


def expand(tokens: Float[Tensor, "b p d"], degrees: Int[Tensor, "b p"], bias: float, k_patches: int) -> Expansion:
    """Let the candidates that are similar to the seed vote for every patch."""
    candidates = degrees.argsort(dim=1, stable=True)[:, :k_patches]
    chosen = tokens[torch.arange(len(tokens), device=tokens.device)[:, None], candidates]
    joins = einsum(chosen, chosen[:, 0], "b k d, b d -> b k") > -bias
    voters = einsum(chosen, joins.to(chosen.dtype), "b k d, b k -> b d")
    votes = einsum(tokens, voters, "b p d, b d -> b p") + joins.sum(dim=1, keepdim=True) * bias
    return Expansion(degrees.cpu(), candidates.cpu(), joins.cpu(), (votes > 0).cpu())
