"""DINO-seg: one box per image from where the class token looks (Simeoni et al. 2021, section 4.2, a baseline there)."""

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.discovery import Discovery, View, check_finite, check_sizes, found


def dino_seg(view: View, *, head: int | None = 4, mass: float = 0.6) -> Discovery:
    """Box the largest connected part of the patches that hold most of the class token's attention.

    Of parts of equal size the first, row by row, is taken. Two things differ from the code published with LOST: every
    connected part may win (there, the last one cannot), and the box is cut at the image.

    Args:
        view: with the attention of the last block.
        head: attention head, from 0; none for the mean over heads.
        mass: share of the attention to patches that is kept, from the highest down, above 0 and at most 1.

    Raises:
        InputError: no attention, a head that is not there, a mass out of range, or values that are not finite.
    """
    if not 0 < mass <= 1:
        raise InputError(f"mass={mass}: the share of attention to keep is above 0 and at most 1; the paper keeps 0.6")
    attention = attention_of(view, head).double().cpu()
    share = attention / attention.sum().clamp_min(torch.finfo(torch.float64).tiny)
    values, order = share.sort(descending=True, stable=True)
    kept = torch.zeros(len(share), dtype=torch.bool)
    kept[order] = values.cumsum(0) - values < mass
    mask = kept.reshape(view.grid)
    labels, _ = ndimage.label(mask.numpy())
    largest = int(np.bincount(labels.ravel())[1:].argmax()) + 1
    seed = int(np.where(labels.ravel() == largest, share.numpy(), -1).argmax())
    return found(view, seed, share.reshape(view.grid), mask)


def attention_of(view: View, head: int | None) -> Float[Tensor, " p"]:
    """One head of a view's attention, or the mean over heads."""
    if view.attention is None:
        raise InputError(
            "DINO-seg needs the class token's attention; use a model with a class token, or another method"
        )
    heads, patches = view.attention.shape
    if head is not None and not 0 <= head < heads:
        raise InputError(
            f"head {head} of an attention layer with {heads} heads; use 0 to {heads - 1}, or none for their mean"
        )
    check_sizes(patches, view.grid, view.patch_size, view.image_size)
    check_finite(view.attention.T, "attention")
    return view.attention.mean(dim=0) if head is None else view.attention[head]
