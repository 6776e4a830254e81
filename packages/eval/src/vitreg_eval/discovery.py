"""Object discovery, whatever the method: what it may look at, what it gives, and the box around a set of patches."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor
from vitreg_core.errors import InputError

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels, half-open."""


@dataclass(frozen=True, eq=False, kw_only=True)
class View:
    """One image as a backbone sees it: all that a method may look at."""

    grid: tuple[int, int]
    """Rows and columns of patches."""
    patch_size: int
    """Side of a patch in pixels."""
    image_size: tuple[int, int]
    """Height and width in pixels before padding; boxes stay inside."""
    name: str = ""
    """What tells the image from others of its set; random boxes depend on it."""
    features: Float[Tensor, "p d"] | None = None
    """One facet of an attention layer, row by row, without class token and registers."""
    attention: Float[Tensor, "heads p"] | None = None
    """From the class token to each patch, after the softmax over all tokens; 0 to 1."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Discovery:
    """The object found in one image. All tensors are on the CPU."""

    box: Box
    """x0, y0, x1, y1 in pixels, half-open; the whole image when the search failed."""
    seed: int
    """Flat index, row by row, of the patch that the object was found from."""
    score: Float[Tensor, "rows cols"]
    """How much each patch looks like an object to the method, in its own units; highest at the seed."""
    mask: Bool[Tensor, "rows cols"]
    """Patches taken for object."""
    component: Bool[Tensor, "rows cols"]
    """The part of the mask that is connected to the seed (4 neighbours); empty when the search failed."""
    full_image: bool
    """Whether the box spans the whole patch grid."""
    failed: bool = False
    """Whether the seed is outside its own mask; such an image counts as a miss."""

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
        rows, cols = self.mask.shape
        row, col = divmod(self.seed, cols)
        return row in (0, rows - 1) or col in (0, cols - 1)

    def diagnostics(self) -> dict[str, int | float | bool]:
        """What tells a good search from a bad one, by name; fit for JSON."""
        return {
            "seed": self.seed,
            "seed_on_border": self.seed_on_border,
            "mask_share": round(self.mask_share, 4),
            "object_share": round(self.component_share, 4),
            "full_image": self.full_image,
            "failed": self.failed,
        }


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


def grid_box(grid: tuple[int, int], patch_size: int, image_size: tuple[int, int]) -> Box:
    """Pixels of the whole patch grid, cut at the image."""
    return 0, 0, min(grid[1] * patch_size, image_size[1]), min(grid[0] * patch_size, image_size[0])


def view_features(view: View) -> Float[Tensor, "p d"]:
    """The features of a view, checked, in float32 or better."""
    if view.features is None:
        raise InputError("this method needs patch features; use a model that gives keys, queries or values")
    check_sizes(len(view.features), view.grid, view.patch_size, view.image_size)
    tokens = view.features.to(torch.promote_types(view.features.dtype, torch.float32))
    check_finite(tokens)
    return tokens


def found(view: View, seed: int, score: Float[Tensor, "rows cols"], mask: Bool[Tensor, "rows cols"]) -> Discovery:
    """What a method found in a view, from its seed and its mask."""
    return Discovery(score=score, **located(mask, seed, view.patch_size, view.image_size))


def located(mask: Bool[Tensor, "rows cols"], seed: int, patch_size: int, image_size: tuple[int, int]) -> dict[str, Any]:
    """The box around the part of a mask that is connected to the seed; the whole grid, and a failure, without one."""
    component = component_at(mask.numpy(), seed)
    rows, cols = mask.shape
    everywhere = grid_box((rows, cols), patch_size, image_size)
    failed = not component.any()
    box = everywhere if failed else box_around(component, patch_size, image_size)
    return {
        "box": box,
        "seed": seed,
        "mask": mask,
        "component": torch.from_numpy(component),
        "full_image": box == everywhere,
        "failed": failed,
    }


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


def check_finite(values: Float[Tensor, "*b p d"], what: str = "features") -> None:
    """Refuse what cannot be compared, and name the first patch."""
    flat = values.flatten()
    if flat.dot(flat).isfinite():
        return  # one product forgets neither nan nor inf, bounds every other product, and is fast
    broken = (~values.isfinite().all(dim=-1)).flatten().nonzero()
    if len(broken):
        image, patch = divmod(int(broken[0]), values.shape[-2])
        where = f"image {image} of the batch, patch {patch}" if values.ndim > 2 else f"patch {patch}"
        raise InputError(
            f"{what} of {len(broken)} of {values[..., 0].numel()} patches are not finite (first: {where}); "
            "run the model in fp32, or check its weights"
        )
    raise InputError(f"{what} up to {values.abs().max():.1e} overflow when multiplied; scale them down")
