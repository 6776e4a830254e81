"""The verdict on a model: whether its patches have an outlier mode, how much of it, and since which block."""

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from vitreg_core.outliers import Outliers, emergence_block, find_outliers, mark_outliers

from vitreg_eval.metrics import Metric, measure
from vitreg_eval.survey import Survey


@dataclass(frozen=True)
class Diagnosis:
    """Outliers after every block."""

    blocks: list[Outliers]
    """The rule's verdicts, each on at most 1,024 images."""
    share: Float[Tensor, " n"]
    """Share of the patches of each image that are outliers after the last block, 0 to 1; of all images."""
    patches: int
    """Patch tokens of all images."""
    max_norm: float
    """Largest norm after the last block, over all images."""

    @property
    def last(self) -> Outliers:
        """Outliers after the last block."""
        return self.blocks[-1]

    @property
    def emergence(self) -> int | None:
        """First block with outliers that the next block has too; None where there is none."""
        return emergence_block([block.found for block in self.blocks])

    @property
    def verdict(self) -> str:
        """One sentence for the reader."""
        if not self.last.found:
            return f"no outlier mode in the norms of {self.patches} patch tokens after the last block"
        since = "in the last block only" if self.emergence is None else f"first seen in block {self.emergence}"
        return (
            f"artifacts: {float(self.share.mean()):.2%} of the patch tokens, in "
            f"{float((self.share > 0).double().mean()):.1%} of images, have norms above {self.last.cutoff:.4g} "
            f"(median {self.last.median_norm:.4g}), {since} of {len(self.blocks)} blocks"
        )


def diagnose(norms: Float[Tensor, "depth b p"]) -> Diagnosis:
    """Apply the rule after every block."""
    blocks = [find_outliers(block) for block in norms]
    return Diagnosis(blocks, blocks[-1].mask.double().mean(dim=1), norms[0].numel(), float(norms[-1].max()))


def diagnose_survey(found: Survey) -> Diagnosis:
    """Apply the rule after every block to images spread over a survey, and count the last block's outliers in all."""
    blocks = [find_outliers(block) for block in found.spread("norms").unbind(dim=1)]
    share, largest, patches = [], 0.0, 0
    for norms in found.pieces("norms"):
        share.append(mark_outliers(norms[:, -1], blocks[-1].cut).double().mean(dim=1))
        largest = max(largest, float(norms[:, -1].max()))
        patches += norms[:, -1].numel()
    return Diagnosis(blocks, torch.cat(share), patches, largest)


def outlier_metrics(found: Diagnosis, seed: int) -> dict[str, Metric]:
    """The numbers of a diagnosis; those that need an outlier mode are left out where there is none."""
    images = len(found.share)
    metrics = {
        "outlier_fraction": measure(found.share, seed=seed),
        "outlier_images": measure(found.share > 0, seed=seed),
        "median_norm": Metric(value=found.last.median_norm, n=len(found.last.mask)),
        "max_norm": Metric(value=found.max_norm, n=images),
    }
    if found.last.cutoff is not None:
        metrics["cutoff"] = Metric(value=found.last.cutoff, n=len(found.last.mask))
    if found.emergence is not None:
        metrics["emergence_block"] = Metric(value=found.emergence, n=len(found.last.mask))
    return metrics


def block_record(index: int, block: Outliers) -> dict[str, object]:
    """One block in plain values."""
    names = ("found", "rule", "cutoff", "fraction", "image_fraction", "median_norm", "max_norm", "ratio", "separation")
    return {"block": index} | {name: getattr(block, name) for name in names} | {"evidence": asdict(block.evidence)}
