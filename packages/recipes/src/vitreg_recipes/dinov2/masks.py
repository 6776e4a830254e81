"""Block-wise masks of patches (BEiT; iBOT; DINOv2), drawn from a generator of python's `random`."""

import math
import random
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

ASPECT = (0.3, 1 / 0.3)
"""Least and greatest height over width of a block."""
LEAST = 4
"""Patches of the smallest block asked for."""
TRIES = 10
"""Blocks that may fail in a row before a mask is given up short."""


def draw_mask(
    grid: tuple[int, int], target: int, generator: random.Random, *, most: int | None = None
) -> Bool[np.ndarray, "rows cols"]:
    """Cover patches by blocks until there are `target`, never more, rarely one or two fewer.

    Args:
        grid: rows and columns of patches.
        target: patches to mask.
        generator: what to draw from; area, aspect and place of each block, in this order.
        most: patches that one block may newly cover; half of the rows if left out.
    """
    most = grid[0] // 2 * grid[1] if most is None else most
    mask = np.zeros(grid, dtype=bool)
    while (missing := target - int(mask.sum())) > 0:
        if not any(add_block(mask, min(missing, most), generator) for _ in range(TRIES)):
            break
    return mask


def add_block(mask: Bool[np.ndarray, "rows cols"], cap: int, generator: random.Random) -> bool:
    """Try to cover one more block; says whether it did."""
    rows, cols = mask.shape
    area = generator.uniform(LEAST, cap)
    aspect = math.exp(generator.uniform(*(math.log(end) for end in ASPECT)))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if height >= rows or width >= cols:
        return False
    top, left = generator.randint(0, rows - height), generator.randint(0, cols - width)
    block = mask[top : top + height, left : left + width]
    if not 0 < block.size - int(block.sum()) <= cap:
        return False
    block[:] = True
    return True


def draw_masks(
    crops: int, grid: tuple[int, int], generator: random.Random, *, share: float, ratios: tuple[float, float]
) -> Bool[Tensor, "crops p"]:
    """Masks for the global crops of a process: a share of them is masked, the rest is not.

    The masked ones have ratios from equal strata of `ratios`, so that the masked patches of a batch are much the same
    in number at every step. Which crops are masked is shuffled.
    """
    patches, masked = grid[0] * grid[1], int(crops * share)
    edges = torch.linspace(*ratios, masked + 1).tolist()
    masks = [draw_mask(grid, int(patches * generator.uniform(low, high)), generator) for low, high in pairwise(edges)]
    masks += [np.zeros(grid, dtype=bool)] * (crops - masked)
    generator.shuffle(masks)
    return torch.from_numpy(np.stack(masks).reshape(crops, patches))
