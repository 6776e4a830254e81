"""The verdict on a model: whether its patches have an outlier mode, how much of it, and since which block."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from vitreg_core.neuron_search import mark
from vitreg_core.outliers import Outliers, emergence_block, find_outliers, mark_outliers

from vitreg_eval.metrics import Metric, measure
from vitreg_eval.survey import Survey


@dataclass(frozen=True)
class Diagnosis:
    """Outliers after every block."""

    blocks: list[Outliers]
    """The rule's verdicts, each on at most 1,024 images."""
    block: int
    """The block that the numbers stand for: the last, or without a mode there the one with the highest mode."""
    share: Float[Tensor, " n"]
    """Share of the patches of each image that are outliers after that block, 0 to 1; of all images."""
    patches: int
    """Patch tokens of all images."""
    max_norm: float
    """Largest norm after that block, over all images."""
    at_input: bool = False
    """Whether the first block has an outlier mode, and so have the tokens that it reads: then no block made it."""

    @property
    def judged(self) -> Outliers:
        """Outliers after the block that the numbers stand for."""
        return self.blocks[self.block]

    @property
    def emergence(self) -> int | None:
        """First block with outliers that the next block has too; None where there is none, or the input has them."""
        return None if self.at_input else emergence_block([block.found for block in self.blocks])

    @property
    def verdict(self) -> str:
        """One sentence for the reader."""
        judged = self.judged
        if judged.cut is None or judged.cutoff is None:
            return f"no outlier mode in the norms of {self.patches} patch tokens after any block"
        gone = f"; these after block {self.block}, none after the last" if self.block < len(self.blocks) - 1 else ""
        return (
            f"artifacts: {float(self.share.mean()):.2%} of the patch tokens, in "
            f"{float((self.share > 0).double().mean()):.1%} of images, have norms more than {math.exp(judged.cut):.3g} "
            f"times the median of their image (about {judged.cutoff:.4g}), {self.since}{gone}"
        )

    @property
    def since(self) -> str:
        """Where they come from."""
        if self.at_input:
            return (
                "but so have the tokens that the first block reads, as flat pictures and untrained weights bring it "
                "about: judge a trained model, on photos (--images)"
            )
        first = "in one block only" if self.emergence is None else f"first seen in block {self.emergence}"
        return f"{first} of {len(self.blocks)} blocks"


def judged_block(blocks: Sequence[Outliers]) -> int:
    """The block to judge by; see `Diagnosis.block`. Norms of some models drop in their last block."""
    chosen = mark(blocks)
    return len(blocks) - 1 if chosen is None else chosen


def diagnose(norms: Float[Tensor, "depth b p"]) -> Diagnosis:
    """Apply the rule after every block."""
    blocks = [find_outliers(block) for block in norms]
    block = judged_block(blocks)
    share = blocks[block].mask.double().mean(dim=1)
    return Diagnosis(blocks, block, share, norms[0].numel(), float(norms[block].max()))


def diagnose_survey(found: Survey) -> Diagnosis:
    """Apply the rule after every block to images spread over a survey, and count one block's outliers in all."""
    blocks = [find_outliers(norms) for norms in found.spread("norms").unbind(dim=1)]
    block = judged_block(blocks)
    share, largest, patches = [], 0.0, 0
    for norms in found.pieces("norms"):
        share.append(mark_outliers(norms[:, block], blocks[block].cut).double().mean(dim=1))
        largest = max(largest, float(norms[:, block].max()))
        patches += norms[:, block].numel()
    at_input = blocks[0].found and found.has("input_norms") and find_outliers(found.spread("input_norms")).found
    return Diagnosis(blocks, block, torch.cat(share), patches, largest, at_input)


def outlier_metrics(found: Diagnosis, seed: int) -> dict[str, Metric]:
    """The numbers of a diagnosis; those that need an outlier mode are left out where there is none."""
    images, judged = len(found.share), found.judged
    metrics = {
        "outlier_fraction": measure(found.share, seed=seed),
        "outlier_images": measure(found.share > 0, seed=seed),
        "median_norm": Metric(value=judged.median_norm, n=len(judged.mask)),
        "max_norm": Metric(value=found.max_norm, n=images),
    }
    if judged.cutoff is not None:
        metrics["cutoff"] = Metric(value=judged.cutoff, n=len(judged.mask))
    if found.emergence is not None:
        metrics["emergence_block"] = Metric(value=found.emergence, n=len(judged.mask))
    return metrics


def block_record(index: int, block: Outliers) -> dict[str, object]:
    """One block in plain values."""
    names = (
        *("found", "rule", "cut", "cutoff", "fraction", "image_fraction"),
        *("median_norm", "max_norm", "ratio", "separation"),
    )
    return {"block": index} | {name: getattr(block, name) for name in names} | {"evidence": asdict(block.evidence)}
