"""Maps of one picture in one block of a model."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from vitreg_core.capturing import capture
from vitreg_core.features import Backbone
from vitreg_core.outliers import find_outliers

from vitreg_eval.analyses.attention import on_grid
from vitreg_eval.analyses.boxes import Box
from vitreg_eval.analyses.pca import pca_maps
from vitreg_eval.lost import discover, full_precision, prepare
from vitreg_eval.models import Model

WHOLE_PASS_BYTES = 2**27
"""What one pass may give of all blocks; of a larger model the chosen block alone is taken, by a pass for each."""


@dataclass(frozen=True, eq=False)
class Look:
    """What one block of a model holds for one picture."""

    tokens: Float[Tensor, "n d"]
    """After the block, before the final norm."""
    attention: Float[Tensor, "h n n"]
    """Rows are queries and sum to 1."""
    keys: Float[Tensor, "p k"]
    """Keys of the patches as projected, heads side by side."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


@dataclass(frozen=True, eq=False)
class LostSteps:
    """How LOST found an object in a picture."""

    image: Float[np.ndarray, "height width 3"]
    """The picture, 0 to 1."""
    score: Float[np.ndarray, "rows cols"]
    """Share of the patches that a patch is not similar to; highest at the seed."""
    similarity: Float[np.ndarray, "rows cols"]
    """Dot product with the seed, after the mean patch was subtracted."""
    voters: Bool[np.ndarray, "rows cols"]
    mask: Bool[np.ndarray, "rows cols"]
    component: Bool[np.ndarray, "rows cols"]
    """The part of the mask around the seed."""
    seed: tuple[int, int]
    """Row and column."""
    box: Box
    """x0, y0, x1, y1 in pixels."""


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps that depend on neither token nor head."""

    norms: Float[np.ndarray, "rows cols"]
    """L2 norms of the patches after the block, before the final norm."""
    outliers: Bool[np.ndarray, "rows cols"]
    """Patches that `find_outliers` marks in this picture alone."""
    ratio: float | None
    """Typical norm of the outliers over that of the other patches; None without outliers."""
    components: Float[np.ndarray, "rows cols 3"]
    """First three principal components of the patches of this picture, 0 to 1."""
    lost: LostSteps
    """The search for an object by LOST, from the keys of the block."""

    @property
    def nbytes(self) -> int:
        """Bytes, nearly all of them in the picture that the steps hold."""
        return self.lost.image.nbytes + 32 * self.norms.size


@torch.no_grad()
def look_into(model: Model, image: Float[Tensor, "3 height width"], layer: int) -> dict[int, Look]:
    """Run a model on a picture; all blocks are kept where they take little memory, else the named one."""
    prefix = model.num_prefix_tokens
    patches = (image.shape[-2] // model.patch_size) * (image.shape[-1] // model.patch_size)
    tokens = prefix + patches
    size = 4 * model.depth * tokens * (2 * model.embed_dim + model.num_heads * tokens)
    layers = range(model.depth) if size <= WHOLE_PASS_BYTES else [layer]
    with capture(model, list(layers), ("after", "attention", "keys")) as seen:
        model.features(image[None])
    return {
        block: Look(
            seen.after[block][0].float(),
            seen.attention[block][0].float(),
            rearrange(seen.keys[block][0, :, prefix:], "h p k -> p (h k)").float(),
        )
        for block in layers
    }


def attention_map(
    look: Look, model: Backbone, token: str, head: int | None, place: tuple[int, int], grid: tuple[int, int]
) -> Float[np.ndarray, "rows cols"] | str:
    """Where a token looks among the patches, or why that cannot be shown.

    Args:
        look: of one block.
        model: which gave it.
        token: `cls`, `register 0` and so on, or `patch` for the clicked one.
        head: from 0; None is the mean over heads.
        place: row and column of the clicked patch.
        grid: rows and columns of patches.
    """
    if head is not None and head >= len(look.attention):
        return f"no head {head}: this model has {len(look.attention)}"
    prefix, query = model.num_prefix_tokens, token_index(token, model.prefix)
    if token == "patch":  # noqa: S105 (a token of a transformer)
        query = prefix + place[0] * grid[1] + place[1]
    if query is None:
        return f"no {token}: this model has {model.num_registers} registers"
    heads = look.attention.mean(dim=0) if head is None else look.attention[head]
    return on_grid(heads[query, prefix:], grid).numpy()


def token_index(token: str, prefix: Sequence[Literal["cls", "register"]]) -> int | None:
    """Where a token before the patches stands; None where there is no such token."""
    registers = (f"register {index}" for index in range(len(prefix)))
    names = [kind if kind == "cls" else next(registers) for kind in prefix]
    return names.index(token) if token in names else None


def similarity_map(
    patches: Float[Tensor, "p d"], place: tuple[int, int], grid: tuple[int, int]
) -> Float[np.ndarray, "rows cols"]:
    """Cosine of each patch to one of them."""
    chosen = patches[place[0] * grid[1] + place[1]]
    return torch.cosine_similarity(patches, chosen[None], dim=-1).reshape(grid).numpy()


def make_maps(model: Backbone, look: Look, pixels: Float[np.ndarray, "height width 3"]) -> Maps:
    """Maps of a block.

    Raises:
        InputError: features that are not finite.
    """
    height, width = pixels.shape[:2]
    grid = height // model.patch_size, width // model.patch_size
    patches = look.tokens[model.num_prefix_tokens :]
    norms = patches.norm(dim=-1)
    found = find_outliers(norms[None])
    return Maps(
        norms=norms.reshape(grid).numpy(),
        outliers=found.mask.reshape(grid).numpy(),
        ratio=found.ratio,
        components=pca_maps(patches[None], grid)[0].numpy(),
        lost=find_object(look.keys, grid, model.patch_size, pixels),
    )


def find_object(
    keys: Float[Tensor, "p k"], grid: tuple[int, int], patch_size: int, pixels: Float[np.ndarray, "height width 3"]
) -> LostSteps:
    """The steps of LOST. The mean patch is subtracted, without which many models have none but similar patches."""
    found = discover(keys, grid, patch_size, (pixels.shape[0], pixels.shape[1]), center=True)
    with full_precision(keys.device.type):
        tokens = prepare(keys[None], center=True, normalize=False)[0]
        similarity = (tokens @ tokens[found.seed]).reshape(grid)
    voters = np.zeros(grid, dtype=bool)
    voters.flat[found.expansion.numpy()] = True
    return LostSteps(
        image=pixels,
        score=found.score.float().numpy(),
        similarity=similarity.numpy(),
        voters=voters,
        mask=found.mask.numpy(),
        component=found.component.numpy(),
        seed=divmod(found.seed, grid[1]),
        box=found.box,
    )
