"""Norms of queries, keys and values of outliers against those of normal patches, head by head.

Does a facet carry the outliers on, or filter them? OpenCLIP's values are said to filter, which would explain why LOST
works on its values and not on its keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from vitreg_eval.analyses.kinds import NORMAL_COLOUR
from vitreg_eval.analyses.panels import OUTLIER_COLOUR, panels


@dataclass(frozen=True)
class FacetNorms:
    """Median norms of one facet of a block, per head."""

    name: str
    normal: Float[np.ndarray, " h"]
    """Median over normal patches; not a number without any."""
    outlier: Float[np.ndarray, " h"]
    """Median over outliers; not a number without any."""

    @property
    def ratio(self) -> Float[np.ndarray, " h"]:
        """Outliers over normal patches: 1 where a head does not tell them apart."""
        return self.outlier / self.normal


def head_norms(facet: Float[Tensor, "b h n k"], prefix: int) -> Float[Tensor, "b h p"]:
    """L2 norm of the vectors of the patches in every head, in float32.

    Args:
        facet: queries, keys or values of all tokens.
        prefix: tokens before the patches.
    """
    return facet[:, :, prefix:].float().norm(dim=-1)


def facet_norms(norms: Mapping[str, Float[Tensor, "b h p"]], outliers: Bool[Tensor, "b p"]) -> list[FacetNorms]:
    """Medians of named facets over normal patches and outliers of all images.

    Args:
        norms: from `head_norms`, by name.
        outliers: which patches are outliers in the last block, or in the block looked at.
    """
    return [FacetNorms(name, medians(values, ~outliers), medians(values, outliers)) for name, values in norms.items()]


def medians(norms: Float[Tensor, "b h p"], chosen: Bool[Tensor, "b p"]) -> Float[np.ndarray, " h"]:
    """Median over the chosen patches per head."""
    picked = norms.movedim(1, -1)[chosen.to(norms.device)].double().cpu()  # n h
    return (
        np.median(picked.numpy(), axis=0) if len(picked) else torch.full(norms.shape[1:2], torch.nan).double().numpy()
    )


def plot_facet_norms(found: Sequence[FacetNorms]) -> Figure:
    """Medians of both kinds of patches for each head; a panel per facet with the median ratio over the heads."""
    figure, grid = panels(1, len(found), width=2.8, height=2.6)
    for axes, one in zip(grid[0], found, strict=True):
        heads = np.arange(len(one.normal))
        axes.bar(heads - 0.2, one.normal, width=0.4, color=NORMAL_COLOUR, label="normal")
        axes.bar(heads + 0.2, one.outlier, width=0.4, color=OUTLIER_COLOUR, label="outlier")
        axes.set_xticks(heads if len(heads) <= 12 else heads[::4])
        axes.set_xlabel("head")
        ratio = float(np.median(one.ratio))
        axes.set_title(
            f"{one.name}: " + ("no outliers" if np.isnan(ratio) else f"outlier / normal {ratio:.2f}"), fontsize=9
        )
    grid[0, 0].set_ylabel("median L2 norm")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure
