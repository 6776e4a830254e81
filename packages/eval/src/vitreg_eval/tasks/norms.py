"""Norms of class, register and patch tokens after every block, before the final norm."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from vitreg_core.features import Backbone
from vitreg_core.precision import use_precision

from vitreg_eval.analyses.norms import norm_quantiles, plot_norms_by_kind, plot_norms_per_block
from vitreg_eval.config import NormsOptions
from vitreg_eval.datasets import ImageSet, photo_folder, scenes
from vitreg_eval.extract import progress
from vitreg_eval.metrics import Metric, measure
from vitreg_eval.results import Outcome, write_json


@dataclass(frozen=True)
class TokenNorms:
    """L2 norms in the residual stream after each block, before the final norm, in float32."""

    cls: Float[Tensor, "depth b"] | None
    registers: Float[Tensor, "depth b r"]
    patches: Float[Tensor, "depth b p"]

    def by_kind(self, block: int = -1) -> dict[str, Float[np.ndarray, " n"]]:
        """Norms after one block of the patches, the class token and each register."""
        kinds = {"patches": self.patches[block].flatten().numpy()}
        if self.cls is not None:
            kinds["cls"] = self.cls[block].numpy()
        return kinds | {f"register {r}": self.registers[block, :, r].numpy() for r in range(self.registers.shape[-1])}


def run(backbone: Backbone, options: NormsOptions, out: Path) -> Outcome:
    """Median and maximum norms by kind of token after the last block; writes norms.json, norms.png, kinds.png."""
    image_set = open_images(backbone, options)
    norms = token_norms(backbone, image_set, options)
    quantiles = norm_quantiles(norms.patches).round(4).tolist()
    write_json(out / "norms.json", {"quantiles": [50, 90, 98, 99.9, 100], "patches_per_block": quantiles})
    plot_norms_per_block({"patch tokens": norms.patches}).savefig(out / "norms.png")
    plot_norms_by_kind(norms.by_kind(), "last block").savefig(out / "kinds.png")
    notes = [
        f"quantiles of every block in {out / 'norms.json'}, pictures in {out / 'norms.png'} and {out / 'kinds.png'}"
    ]
    return Outcome(evaluate(norms, options.seed), image_set.data, notes)


def open_images(backbone: Backbone, options: NormsOptions) -> ImageSet:
    """The photos of the options, or drawn scenes."""
    if options.images is None:
        return scenes(backbone.preprocess, options.test_images, options.seed, "test")
    return photo_folder(backbone.preprocess, options.images, options.limit, options.batch_size)


@torch.no_grad()
def token_norms(backbone: Backbone, image_set: ImageSet, options: NormsOptions) -> TokenNorms:
    """Norms of all tokens of all images after every block."""
    parts = []
    for batch in progress(image_set, "norms"):
        with use_precision(options.precision, backbone.device):
            layers = backbone.intermediate(batch.images.to(backbone.device), range(backbone.depth), norm=False)
        kinds = [(layer.cls, layer.registers, layer.patches) for layer in layers]
        parts.append([stack_norms(kind) for kind in zip(*kinds, strict=True)])
    cls, registers, patches = (
        None if kind[0] is None else torch.cat([part for part in kind if part is not None], dim=1)
        for kind in zip(*parts, strict=True)
    )
    assert registers is not None
    assert patches is not None
    return TokenNorms(cls, registers, patches)


def stack_norms(layers: tuple[Tensor | None, ...]) -> Tensor | None:
    """Norms of one kind of token after each block, on the CPU."""
    if layers[0] is None:
        return None
    return torch.stack([layer.float().norm(dim=-1).cpu() for layer in layers if layer is not None])


def evaluate(norms: TokenNorms, seed: int) -> dict[str, Metric]:
    """Mean over images of each image's median, and of its maximum, after the last block."""
    last = norms.patches[-1]
    per_image = {"patch_median": last.median(dim=1).values, "patch_max": last.max(dim=1).values}
    if norms.cls is not None:
        per_image["cls"] = norms.cls[-1]
    for index in range(norms.registers.shape[-1]):
        per_image[f"register_{index}"] = norms.registers[-1, :, index]
    return {name: measure(values, seed=seed) for name, values in per_image.items()}
