"""The doctor: does a backbone have outlier tokens, how many, from which block on, and what they look like."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from vitreg_core.features import Backbone
from vitreg_core.outliers import Outliers, emergence_block, find_outliers

from vitreg_eval.analyses.attention import prefix_maps
from vitreg_eval.analyses.norms import plot_norm_histogram, plot_norm_maps, plot_norms_per_block, worst_images
from vitreg_eval.analyses.panels import image_rows
from vitreg_eval.config import DoctorOptions
from vitreg_eval.datasets import ImageSet
from vitreg_eval.metrics import Metric, measure
from vitreg_eval.results import Outcome, write_json
from vitreg_eval.tasks.norms import open_images, token_norms

PICTURES = 6


@dataclass(frozen=True)
class Diagnosis:
    """Outliers after every block."""

    norms: Float[Tensor, "depth b p"]
    blocks: list[Outliers]

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
            return f"no outlier mode in the norms of {self.norms[0].numel()} patch tokens after the last block"
        since = "in the last block only" if self.emergence is None else f"first seen in block {self.emergence}"
        return (
            f"artifacts: {self.last.fraction:.2%} of the patch tokens, in {self.last.image_fraction:.1%} of images, "
            f"have norms above {self.last.cutoff:.4g} (median {self.last.median_norm:.4g}), {since} "
            f"of {len(self.blocks)} blocks"
        )


def run(backbone: Backbone, options: DoctorOptions, out: Path) -> Outcome:
    """Outliers by the threshold-free rule after each block; writes blocks.json and pictures.

    Metrics: `outlier_fraction` of the patch tokens and `outlier_images` (share with at least one) after the last
    block, `median_norm`, `max_norm`, and, where there is an outlier mode, `cutoff` and `emergence_block`.
    """
    image_set = open_images(backbone, options)
    found = diagnose(token_norms(backbone, image_set, options).patches)
    write_json(out / "blocks.json", [block_record(index, block) for index, block in enumerate(found.blocks)])
    draw(backbone, image_set, found, out)
    notes = [
        found.verdict,
        f"norms.png, histogram.png, images.png, attention.png and blocks.json (with simpler statistics) are in {out}",
    ]
    if found.last.found:
        notes.append(
            "what to do: pretrain with registers (--model.registers 4), or keep the outliers off the patches "
            "with vitreg_core.test_time, given the neurons that write them"
        )
    return Outcome(evaluate(found, options.seed), image_set.data, notes)


def diagnose(norms: Float[Tensor, "depth b p"]) -> Diagnosis:
    """Apply the rule after every block."""
    return Diagnosis(norms, [find_outliers(block) for block in norms])


def evaluate(found: Diagnosis, seed: int) -> dict[str, Metric]:
    """The numbers of a diagnosis; those that need an outlier mode are left out where there is none."""
    images = found.norms.shape[1]
    metrics = {
        "outlier_fraction": measure(found.last.mask.double().mean(dim=1), seed=seed),
        "outlier_images": measure(found.last.mask.any(dim=1), seed=seed),
        "median_norm": Metric(value=found.last.median_norm, n=images),
        "max_norm": Metric(value=found.last.max_norm, n=images),
    }
    if found.last.cutoff is not None:
        metrics["cutoff"] = Metric(value=found.last.cutoff, n=images)
    if found.emergence is not None:
        metrics["emergence_block"] = Metric(value=found.emergence, n=images)
    return metrics


def block_record(index: int, block: Outliers) -> dict[str, object]:
    """One block for blocks.json."""
    names = ("found", "rule", "cutoff", "fraction", "image_fraction", "median_norm", "max_norm", "ratio", "separation")
    return {"block": index} | {name: getattr(block, name) for name in names} | {"evidence": asdict(block.evidence)}


def draw(backbone: Backbone, image_set: ImageSet, found: Diagnosis, out: Path) -> None:
    """Norms of every block, the histogram of the last, and images with their norm and attention maps."""
    plot_norms_per_block({"patch tokens": found.norms}).savefig(out / "norms.png")
    plot_norm_histogram(found.norms[-1], found.last, "after the last block").savefig(out / "histogram.png")
    chosen = worst_images(found.last.mask, found.norms[-1], PICTURES)
    images = pick(image_set, chosen)
    rows, cols = (side // backbone.patch_size for side in images.shape[-2:])
    maps = rearrange(found.norms[:, chosen], "depth b (rows cols) -> depth b rows cols", rows=rows, cols=cols)
    before = max((len(maps) - 1 if found.emergence is None else found.emergence) - 1, 0)
    names = (f"norms, block {before}", f"norms, block {len(maps) - 1}")
    pictures = [picture(backbone, image) for image in images]
    plot_norm_maps(pictures, maps[before], maps[-1], names).savefig(out / "images.png")
    with torch.no_grad():
        attention = backbone.attention(images.to(backbone.device), -1).float().cpu()
    looks = prefix_maps(attention, backbone.num_prefix_tokens, (rows, cols))[:, 0]
    image_rows(pictures, {"cls attention": list(looks.numpy())}).savefig(out / "attention.png")


def pick(image_set: ImageSet, chosen: list[int]) -> Float[Tensor, "b 3 height width"]:
    """Some images of a set, read again."""
    start, kept = 0, {}
    for batch in image_set.batches():
        for index in set(chosen) & set(range(start, start + len(batch.images))):
            kept[index] = batch.images[index - start]
        start += len(batch.images)
        if len(kept) == len(set(chosen)):
            break
    return torch.stack([kept[index] for index in chosen])


def picture(backbone: Backbone, image: Float[Tensor, "3 height width"]) -> Float[np.ndarray, "height width 3"]:
    """Pixels in 0 to 1 of a normalised image."""
    return backbone.preprocess.denormalize(image).permute(1, 2, 0).numpy()
