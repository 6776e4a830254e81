"""The figures of a report: several models side by side on the same images."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from vitreg_core.vit import VisionTransformer

from vitreg_eval.analyses.attention import peakiness, prefix_maps
from vitreg_eval.analyses.boxes import plot_boxes
from vitreg_eval.analyses.norms import plot_norms_by_kind, plot_norms_per_block
from vitreg_eval.analyses.panels import image_rows
from vitreg_eval.analyses.pca import pca_maps
from vitreg_eval.config import LostOptions
from vitreg_eval.datasets import ImageSet
from vitreg_eval.datasets.photos import Photo
from vitreg_eval.diagnosis import diagnose
from vitreg_eval.exam import picture_of
from vitreg_eval.report import Picture, Section, picture
from vitreg_eval.tasks import lost, norms

SHOWN = 8


@dataclass(frozen=True)
class Exhibit:
    """Models, and the images that all of them are shown on."""

    models: Mapping[str, VisionTransformer]
    images: Float[Tensor, "b 3 height width"]
    """Normalised; the models share one preprocessing."""
    boxes: list[list[list[int]]]
    """True boxes of each image; empty where there are none."""
    norms: Mapping[str, norms.TokenNorms]
    """Norms of each model over the whole image set."""
    lost: LostOptions

    @property
    def first(self) -> VisionTransformer:
        """Any of the models: they share image size and patch size."""
        return next(iter(self.models.values()))

    @property
    def pictures(self) -> list[np.ndarray]:
        """The images as they are drawn."""
        return [picture_of(self.first, image) for image in self.images]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.images.shape[-2:]
        return height // self.first.patch_size, width // self.first.patch_size


def exhibit(
    models: Mapping[str, VisionTransformer],
    image_set: ImageSet,
    measured: Mapping[str, norms.TokenNorms],
    lost_options: LostOptions,
) -> Exhibit:
    """Take the first few images to be shown: a rule, not a choice."""
    batch = next(iter(image_set.batches()))
    boxes = batch.targets.get("boxes")
    found = [[] for _ in batch.images] if boxes is None else [b[b.any(dim=-1)].tolist() for b in boxes]
    return Exhibit(models, batch.images[:SHOWN], found[:SHOWN], measured, lost_options)


def show(shown: Exhibit) -> list[Section]:
    """All sections of figures."""
    return [norm_section(shown), attention_section(shown), pca_section(shown), box_section(shown)]


def norm_section(shown: Exhibit) -> Section:
    """Norms per block, per kind of token, and as maps."""
    patches = {name: measured.patches for name, measured in shown.norms.items()}
    found = {name: diagnose(values) for name, values in patches.items()}
    short = ["artifacts" if diagnosis.judged.found else "no outlier mode" for diagnosis in found.values()]
    figures = [
        picture(
            plot_norms_per_block(patches, short),
            "Norms of patch tokens after each block, before the final norm; darker where more tokens are.",
        ),
        norm_maps(shown),
    ]
    figures += [
        picture(plot_norms_by_kind(measured.by_kind(), name), f"{name}: norms in the last block by kind of token.")
        for name, measured in shown.norms.items()
        if measured.registers.shape[-1]
    ]
    return Section("Norms", [f"{name}: {diagnosis.verdict}." for name, diagnosis in found.items()], figures=figures)


def norm_maps(shown: Exhibit) -> Picture:
    """Where the norms are, relative to the median of each image."""
    rows, cols = shown.grid
    maps = {}
    for name, measured in shown.norms.items():
        last = measured.patches[-1, : len(shown.images)]
        relative = last / last.median(dim=1, keepdim=True).values
        maps[name] = list(rearrange(relative.log(), "b (rows cols) -> b rows cols", rows=rows, cols=cols).numpy())
    caption = "Norms in the last block over the median of each image, on log scale; each map has its own colour range."
    return picture(image_rows(shown.pictures, maps), caption)


@torch.no_grad()
def attention_section(shown: Exhibit) -> Section:
    """Where class token and registers look in the last block."""
    looks = {
        name: prefix_maps(model.attention(shown.images, -1), model.num_prefix_tokens, shown.grid)
        for name, model in shown.models.items()
    }
    peaks = [f"{name}: {float(peakiness(maps[:, 0]).mean()):.1f}" for name, maps in looks.items()]
    text = [
        "Last block, mean over heads, patches only. Largest over median attention of the class token, mean over the "
        f"images shown: {'; '.join(peaks)}. The higher, the more the map consists of isolated peaks."
    ]
    rows = {name: list(maps[:, 0].numpy()) for name, maps in looks.items()}
    figures = [picture(image_rows(shown.pictures, rows), "Attention of the class token.")]
    for name, maps in looks.items():
        if maps.shape[1] > 1:
            registers = {f"register {index - 1}": list(maps[:, index].numpy()) for index in range(1, maps.shape[1])}
            figures.append(picture(image_rows(shown.pictures, registers), f"{name}: attention of each register."))
    return Section("Attention maps", text, figures=figures)


@torch.no_grad()
def pca_section(shown: Exhibit) -> Section:
    """First three principal components of the patch tokens as red, green and blue."""
    maps = {
        name: list(pca_maps(model(shown.images).patches, shown.grid).numpy()) for name, model in shown.models.items()
    }
    caption = "First three principal components of the patch tokens of these images, after the final norm, as colours."
    return Section("Feature maps", figures=[picture(image_rows(shown.pictures, maps), caption)])


def box_section(shown: Exhibit) -> Section:
    """What LOST finds in the images."""
    figures = []
    for name, model in shown.models.items():
        pixels = [torch.from_numpy(image).permute(2, 0, 1) for image in shown.pictures]
        photos = [Photo(str(index), image, None) for index, image in enumerate(pixels)]
        found = [find.discovery.box for find in lost.search(model, photos, shown.lost)]
        figures.append(picture(plot_boxes(shown.pictures, found, shown.boxes), f"{name}: red is found, green is true."))
    text = [f"LOST (Simeoni et al. 2021) on the {shown.lost.features} of the last block; one box per image."]
    return Section("Object discovery", text, figures=figures)
