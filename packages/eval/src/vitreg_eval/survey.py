"""One pass over any number of images that keeps, on disk, what the analyses of outlier tokens read.

Of every image a few kilobytes stay: norms after each block, the maps of the last attention, norms of its queries, keys
and values, and how alike neighbouring patches are. All else is thrown away batch by batch, so that memory does not grow
with the number of images. The pass goes on where it was stopped, and several processes share it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from vitreg_core.capturing import capture, find_anatomy
from vitreg_core.denoise import Denoised
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone, Features
from vitreg_core.precision import Precision, use_precision

from vitreg_eval.analyses.attention import prefix_maps
from vitreg_eval.analyses.neighbours import neighbour_similarity
from vitreg_eval.datasets import TolerantSet
from vitreg_eval.extract import Reading, compute, share
from vitreg_eval.manifest import claim, describe, store_folder
from vitreg_eval.processes import processes, refuse_without_cache
from vitreg_eval.store import Store
from vitreg_eval.tokens import checked

SPREAD = 1024
"""Images that analyses look at together, at most; evenly spread over the set."""
ATTENTION_BYTES = 2**28
"""What the attention weights of a batch may take."""
PARTS = ("attention", "facets", "embeddings")
"""What a model may lack. Norms and patch tokens every backbone has."""
NAMED = 5
"""Unreadable images that are named."""


@dataclass(frozen=True)
class Survey:
    """What the pass kept of all images that can be read."""

    store: Store
    images: TolerantSet
    prefix: tuple[str, ...]
    """Kinds of the tokens before the patches."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    missing: dict[str, str]
    """Parts that the model lacks, and why."""

    @cached_property
    def there(self) -> Int[Tensor, " n"]:
        """Indices of the images that can be read."""
        if not self.images.names:
            return torch.arange(self.images.images.data.n)
        return self.store.rows("target.readable").nonzero()[:, 0]

    def __len__(self) -> int:
        return len(self.there)

    @property
    def unreadable(self) -> list[str]:
        """Names of the images that cannot be read."""
        there = set(self.there.tolist())
        return [name for index, name in enumerate(self.images.names) if index not in there]

    @cached_property
    def chosen(self) -> Int[Tensor, " few"]:
        """At most 1,024 images, evenly spread, as indices among all."""
        count = min(len(self), SPREAD)
        return self.there[torch.arange(count) * len(self) // count]

    def has(self, name: str) -> bool:
        """Whether something was kept."""
        return self.store.path(name).exists()

    def spread(self, name: str) -> Shaped[Tensor, "few ..."]:
        """What was kept of at most 1,024 images, evenly spread."""
        return self.store.rows(name, self.chosen)

    def pieces(self, name: str) -> Iterator[Shaped[Tensor, "b ..."]]:
        """What was kept of all images, shard by shard."""
        for span in self.store.spans:
            inside = self.there[(self.there >= span.start) & (self.there < span.stop)]
            if len(inside):
                yield self.store.rows(name, inside)


def survey(backbone: Backbone, images: TolerantSet, options: Any, folder: Path) -> Survey:  # noqa: ANN401
    """Run a frozen backbone over a set of images, or read what an earlier run kept.

    Args:
        backbone: in evaluation mode, on its device.
        images: any number of them; those that cannot be read are left out.
        options: `precision` of the arithmetic, and `cache`, a folder that several commands and processes share.
        folder: where to keep the records without a cache.

    Raises:
        InputError: no image can be read, norms are not finite, or a folder cannot be written.
    """
    refuse_without_cache() if options.cache is None else None
    missing = find_missing(backbone)
    kept = {"records": [part for part in PARTS if part not in missing]}
    manifest = describe(backbone, images.images, options.precision, kept)
    name = f"survey-{images.images.data.name}"
    store = Store(store_folder(options.cache or folder, name, manifest), images.images.data.n, manifest["shard"])
    claim(store.folder, manifest)
    group = processes(cpu=backbone.device.type == "cpu")
    reading = Reading(partial(look, backbone, options.precision, kept["records"]), keep, pin=on_gpu(backbone))
    compute(images.images, reading, store, share(store, group))
    group.wait()
    found = Survey(store, images, backbone.prefix, store.layout(store.spans[-1]).grid, missing)
    if not len(found):
        names = ", ".join(images.names[:NAMED])
        raise InputError(f"none of the {len(images.names)} images can be read, such as {names}; give other photos")
    return found


def on_gpu(backbone: Backbone) -> bool:
    """Whether batches are copied to a GPU."""
    return backbone.device.type == "cuda"


def keep(name: str, values: Tensor, start: int) -> Tensor:
    """Records of a batch on the CPU; norms must be finite, similarities at the border are not."""
    return checked(name, values, torch.float32, start) if "norms" in name else values.float().cpu()


@torch.no_grad()
def find_missing(backbone: Backbone) -> dict[str, str]:
    """Parts that a model lacks, and what it says."""
    size = backbone.preprocess.config.image_size
    image = torch.zeros(1, 3, size, size, device=backbone.device)
    tries: dict[str, Callable[[], object]] = {
        "attention": lambda: backbone.attention(image, -1),
        "facets": lambda: backbone.qkv(image, -1),
        "embeddings": lambda: backbone.embeddings(image),
    }
    missing = {}
    for part, attempt in tries.items():
        try:
            attempt()
        except InputError as error:
            missing[part] = str(error)
    return missing


@torch.no_grad()
def look(
    backbone: Backbone, precision: Precision, parts: Sequence[str], images: Float[Tensor, "b 3 height width"]
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Records of a batch by name, and the grid of the patches."""
    pieces, grid = [], (0, 0)
    for piece in images.split(images_at_once(backbone, images)):
        with use_precision(precision, backbone.device):
            rows, grid = look_at(backbone, parts, piece.to(backbone.device, non_blocking=True))
        pieces.append(rows)
    return {name: torch.cat([rows[name] for rows in pieces]) for name in pieces[0]}, grid


def images_at_once(backbone: Backbone, images: Float[Tensor, "b 3 height width"]) -> int:
    """As many as have attention weights that fit."""
    tokens = backbone.num_prefix_tokens + images.shape[-2] * images.shape[-1] // backbone.patch_size**2
    return max(1, ATTENTION_BYTES // (4 * backbone.num_heads * tokens**2))


def look_at(
    backbone: Backbone, parts: Sequence[str], images: Float[Tensor, "b 3 height width"]
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The records of a batch: one forward pass, or for averaged features as many as their views take."""
    if isinstance(backbone, Denoised):
        return look_at_averages(backbone, parts, images)
    inside = [*(["attention"] if "attention" in parts else []), *(FACETS if "facets" in parts else [])]
    with block_norms(backbone) as norms, ExitStack() as stack:
        seen = stack.enter_context(capture(backbone, -1, inside)) if inside else None
        features = backbone.features(images)
    rows = split_norms(torch.stack(norms[1:], dim=1), backbone.num_prefix_tokens)
    rows["input_norms"] = norms[0][:, -features.patches.shape[1] :].contiguous()
    rows["output_similarity"] = neighbour_similarity(features.patches.float(), features.grid)
    if "embeddings" in parts:
        rows["input_similarity"] = neighbour_similarity(backbone.embeddings(images).float(), features.grid)
    if seen is not None and "attention" in parts:
        rows["attention"] = attention_maps(seen.attention[-1].float(), backbone.num_prefix_tokens, features)
    if seen is not None and "facets" in parts:
        facets = torch.stack([getattr(seen, name)[-1] for name in FACETS], dim=1)[..., backbone.num_prefix_tokens :, :]
        rows["facet_norms"] = torch.linalg.vector_norm(facets.float(), dim=-1)
    return rows, features.grid


def look_at_averages(
    backbone: Denoised, parts: Sequence[str], images: Float[Tensor, "b 3 height width"]
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The same of a model whose features are averages, through what it shows."""
    prefix = backbone.num_prefix_tokens
    layers = backbone.intermediate(images, range(backbone.depth), norm=False)
    features = backbone.features(images)
    norms = torch.stack([torch.linalg.vector_norm(layer.tokens.float(), dim=-1) for layer in layers], dim=1)
    rows = split_norms(norms, prefix)
    rows["output_similarity"] = neighbour_similarity(features.patches.float(), features.grid)
    if "embeddings" in parts:
        rows["input_similarity"] = neighbour_similarity(backbone.embeddings(images).float(), features.grid)
    if "attention" in parts:
        rows["attention"] = attention_maps(backbone.attention(images, -1).float(), prefix, features)
    if "facets" in parts:
        found = backbone.qkv(images, -1)
        facets = torch.stack([getattr(found, name) for name in FACETS], dim=1)[..., prefix:, :]
        rows["facet_norms"] = torch.linalg.vector_norm(facets.float(), dim=-1)
    return rows, features.grid


FACETS = ("queries", "keys", "values")


@contextmanager
def block_norms(backbone: Backbone) -> Iterator[list[Float[Tensor, "b n"]]]:
    """L2 norms, in float32, of all tokens of one forward pass: before the first block, then after every block."""
    assert isinstance(backbone, nn.Module)
    norms: list[Float[Tensor, "b n"]] = []

    def measure(_block: nn.Module, _inputs: object, tokens: Float[Tensor, "b n d"]) -> None:
        norms.append(torch.linalg.vector_norm(tokens.float(), dim=-1))

    def enter(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        measure(block, inputs, next(iter([*inputs, *named.values()])))

    blocks = find_anatomy(backbone).blocks
    handles = [block.register_forward_hook(measure) for block in blocks]
    handles.append(blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()


def split_norms(norms: Float[Tensor, "b depth n"], prefix: int) -> dict[str, Float[Tensor, "b depth _"]]:
    """Norms of the patches, and of what stands before them."""
    return {"norms": norms[..., prefix:].contiguous(), "prefix_norms": norms[..., :prefix].contiguous()}


def attention_maps(
    attention: Float[Tensor, "b h n n"], prefix: int, features: Features
) -> Float[Tensor, "b maps rows cols"]:
    """Where class token and registers look; for a model without either, where its patches do on average."""
    if prefix:
        return prefix_maps(attention, prefix, features.grid)
    return attention.mean(dim=(1, 2))[:, None].unflatten(-1, features.grid)
