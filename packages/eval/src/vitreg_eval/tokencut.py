"""TokenCut: one box per image by cutting the graph of its patches in two (Wang et al. 2022, section 3).

Two patches are joined strongly when the cosine of their features exceeds a threshold, and barely otherwise. The
normalised cut of that graph (Shi and Malik 2000) parts object from background. Unlike LOST it holds the p x p graph,
in double precision: 11 MB at 30 x 40 patches, 184 MB at 60 x 80, twice that while it is factorised.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy import linalg
from scipy.sparse.linalg import LinearOperator, eigsh
from vitreg_core.errors import InputError

from vitreg_eval.discovery import Discovery, View, found, view_features
from vitreg_eval.lost import full_precision


def tokencut(view: View, *, tau: float = 0.2, eps: float = 1e-5) -> Discovery:
    """Box the connected part, around the most extreme patch, of one side of the normalised cut.

    The sides are the patches above and below the mean of the second smallest eigenvector of (D - W) y = lambda D y;
    the patch of largest magnitude is the seed, and its side the object. Where all joints are alike (one patch, all
    patches similar, or none) every cut is as good as another, and the search fails.

    Args:
        view: with features; the paper takes keys of the last block.
        tau: cosine above which two patches are joined, -1 to 1.
        eps: weight of the other joints, above 0 and below 1.

    Raises:
        InputError: no features or none that are finite, or a setting out of range.
    """
    if not (-1 <= tau <= 1 and 0 < eps < 1):
        raise InputError(
            f"tau={tau}, eps={eps}: use tau from -1 to 1 and eps above 0 and below 1; the paper: 0.2, 1e-5"
        )
    weights = joints(view_features(view), tau, eps)
    if (weights == weights[0, -1]).all(where=~np.eye(len(weights), dtype=bool)):
        alike = torch.zeros(view.grid, dtype=torch.float64)
        return found(view, 0, alike, alike > 0)
    vector = second_eigenvector(weights)
    seed = int(np.abs(vector).argmax())
    above = vector > vector.mean()
    mask, sign = (above, 1) if above[seed] else (~above, -1)
    score = torch.from_numpy(sign * vector).reshape(view.grid)
    return found(view, seed, score, torch.from_numpy(mask).reshape(view.grid))


def joints(features: Float[torch.Tensor, "p d"], tau: float, eps: float) -> Float[np.ndarray, "p p"]:
    """Weight of each pair of patches: 1 where their cosine exceeds tau, else eps."""
    with full_precision("cpu"):
        tokens = F.normalize(features.cpu(), dim=1)
        return np.where((tokens @ tokens.T > tau).numpy(), 1.0, eps)


def second_eigenvector(weights: Float[np.ndarray, "p p"]) -> Float[np.ndarray, " p"]:
    """Second smallest generalised eigenvector of D - W and D, of unit length in the norm of D.

    With the known first vector moved out of the way, I - D^-1/2 W D^-1/2 is positive definite, and its smallest
    eigenvalue is the largest of its inverse: one Cholesky factor and a few solves, where a dense solver would reduce
    the whole matrix.
    """
    root = np.sqrt(weights.sum(axis=0))
    first = root / np.linalg.norm(root)
    matrix = np.outer(first, first) - weights / np.outer(root, root)
    matrix.flat[:: len(matrix) + 1] += 1
    factor = linalg.cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)
    inverse = LinearOperator(matrix.shape, lambda vector: linalg.cho_solve(factor, vector, check_finite=False))
    start = np.random.default_rng(0).standard_normal(len(matrix))  # a fixed one: the same box each time
    _, vectors = eigsh(inverse, k=1, v0=start)
    return vectors[:, 0] / root
