"""Boxes to compare object discovery with: the whole image, its centre, chance, and the first principal component.

None of them is published; a method that does not beat them has found nothing.
"""

from hashlib import sha256

import numpy as np
import torch
from scipy import linalg

from vitreg_eval.discovery import Box, Discovery, View, found, grid_box, view_features


def full_box(view: View) -> Discovery:
    """The whole image: cheap and strong where objects are large."""
    height, width = view.image_size
    return around(view, (0, 0, width, height))


def center_box(view: View) -> Discovery:
    """A box of half the height and half the width around the centre."""
    height, width = view.image_size
    return around(view, (width // 4, height // 4, width - width // 4, height - height // 4))


def random_box(view: View, *, seed: int = 0) -> Discovery:
    """A box between two patches drawn at random, both inside; the seed and the name of the image decide which."""
    digest = sha256(f"{seed} {view.name}".encode()).digest()
    draw = np.random.default_rng(list(digest))
    (top, bottom), (left, right) = (sorted(draw.integers(0, size, 2).tolist()) for size in view.grid)
    height, width = view.image_size
    side = view.patch_size
    return around(view, (left * side, top * side, min((right + 1) * side, width), min((bottom + 1) * side, height)))


def around(view: View, box: Box) -> Discovery:
    """A box that no score led to: the patches that it touches are the object, the middle one is the seed."""
    x0, y0, x1, y1 = box
    side, (rows, cols) = view.patch_size, view.grid
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    mask[y0 // side : -(-y1 // side), x0 // side : -(-x1 // side)] = True
    row, col = min((y0 + y1) // 2 // side, rows - 1), min((x0 + x1) // 2 // side, cols - 1)
    return Discovery(
        box=box,
        seed=row * cols + col,
        score=mask.float(),
        mask=mask,
        component=mask,
        full_image=box == grid_box(view.grid, side, view.image_size),
    )


def first_component(view: View) -> Discovery:
    """The connected patches around the highest value of the first principal component, where it is positive.

    The component's sign is the one that makes the outer patches negative on average; where all patches are outer
    ones, its largest value is positive. Patches that are all alike fail.
    """
    tokens = view_features(view).double().cpu().numpy()
    tokens = tokens - tokens.mean(axis=0)
    last = tokens.shape[1] - 1
    _, axis = linalg.eigh(tokens.T @ tokens, subset_by_index=[last, last])
    score = (tokens @ axis[:, 0]).reshape(view.grid)
    inner = np.zeros(view.grid, dtype=bool)
    inner[1:-1, 1:-1] = True
    outward = score[~inner].mean() if inner.any() else -score.flat[np.abs(score).argmax()]
    if outward > 0:
        score = -score
    return found(view, int(score.argmax()), torch.from_numpy(score), torch.from_numpy(score > 0))
