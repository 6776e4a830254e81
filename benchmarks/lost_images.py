"""Object discovery end to end: images per second of the command's path against the plain loop of the original form.

    python benchmarks/lost_images.py [--images 24] [--model vit_s16] [--data ../shared/data] [--features keys]

The plain loop is the one that LOST published, written from its description: one image at a time at its own size, a hook
on the packed projection of the last block, a whole forward pass through our model (so that both run the same attention
kernel), and the literal search with a dense Gram matrix. Ours runs the blocks before the last one, the part of it that
is needed, in batches of equal padded size, with decoding ahead. Images take turns by set, on one thread; CPU seconds.
Boxes are compared; TF32-like products (`fp32-fast`) may change some, and the share is printed.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from scipy import ndimage
from torch import Tensor
from vitreg_core import VisionTransformer, load_model
from vitreg_core.data.images import to_tensor
from vitreg_eval.config import LostOptions
from vitreg_eval.datasets.photos import PhotoFile, open_photos, read_stored
from vitreg_eval.search import Item, pad_to_patches, search_items

Boxes = list[list[int]]


def literal(features: Tensor, grid: tuple[int, int], patch_size: int, image_size: tuple[int, int]) -> list[int]:
    """LOST as one would write it first, with all that the original computes; ties go to the lowest index."""
    gram = features @ features.T
    positive = gram.clone()
    positive.fill_diagonal_(0)
    positive[positive < 0] = 0
    _ = positive + positive.T
    order = (positive > 0).sum(dim=1).argsort(stable=True)
    seed = int(order[0])
    voters = order[:100][gram[seed, order[:100]] > 0]
    mask = (gram[voters].sum(dim=0) > 0).reshape(grid).numpy()
    labels, _ = ndimage.label(mask)
    rows, cols = (labels == labels.flat[seed]).nonzero()
    right, bottom = (int(cols.max()) + 1) * patch_size, (int(rows.max()) + 1) * patch_size
    return [
        int(cols.min()) * patch_size,
        int(rows.min()) * patch_size,
        min(right, image_size[1]),
        min(bottom, image_size[0]),
    ]


@torch.no_grad()
def plain_loop(model: VisionTransformer, photos: list[PhotoFile], features: str) -> Boxes:
    """One image after the other."""
    kept: list[Tensor] = []
    handle = model.block(-1).attn.qkv.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    third = ("queries", "keys", "values").index(features)
    boxes = []
    for photo in photos:
        pixels = to_tensor(read_stored(photo.path))
        images = pad_to_patches(model.preprocess.normalize(pixels)[None], model.patch_size)
        model(images)
        grid = images.shape[-2] // model.patch_size, images.shape[-1] // model.patch_size
        patches = kept.pop()[0, model.num_prefix_tokens :].chunk(3, dim=1)[third]
        boxes.append(literal(patches, grid, model.patch_size, (pixels.shape[1], pixels.shape[2])))
    handle.remove()
    return boxes


def ours(model: VisionTransformer, photos: list[PhotoFile], features: str, precision: str) -> Boxes:
    """The path of `vitreg-eval lost`."""
    options = LostOptions(features=features, precision=precision)
    finds = sorted(
        search_items(model, [Item(*pair) for pair in enumerate(photos)], options), key=lambda one: one.item.number
    )
    return [[int(value) for value in one.found[0].box] for one in finds]


def timed(run: Callable[..., Boxes], *arguments: object) -> tuple[Boxes, float]:
    """Boxes and CPU seconds."""
    start = time.process_time()
    boxes = run(*arguments)
    return boxes, time.process_time() - start


def main() -> None:
    """Print images per second and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--model", default="vit_s16")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--features", default="keys", choices=("keys", "queries", "values"))
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_model(chosen.model).eval()
    options = LostOptions(dataset="voc12", data=chosen.data)
    listed = [photo for photo in open_photos(model.preprocess, options).photos if isinstance(photo, PhotoFile)]
    photos = [listed[index * len(listed) // chosen.images] for index in range(chosen.images)]
    print(f"{chosen.model}, {chosen.features} of the last block, {len(photos)} images of VOC 2012, one thread")
    print("attention kernel of both: torch scaled_dot_product_attention (CPU), as vitreg_core.attention.attend chooses")
    ours(model, photos[:2], chosen.features, "fp32")
    plain_loop(model, photos[:2], chosen.features)
    seconds: dict[str, list[float]] = {"plain loop": [], "fp32": [], "fp32-fast": [], "bf16": []}
    found: dict[str, Boxes] = {}
    for _ in range(chosen.rounds):
        for name, times in seconds.items():
            arguments = (model, photos, chosen.features, *(() if name == "plain loop" else (name,)))
            found[name], used = timed(plain_loop if name == "plain loop" else ours, *arguments)
            times.append(used)
    base = median(seconds["plain loop"])
    for name, times in seconds.items():
        pairs = zip(found[name], found["plain loop"], strict=True)
        changed = sum(own != theirs for own, theirs in pairs)
        used = median(times)
        print(
            f"{name:11} {len(photos) / used:6.2f} images/s  {base / used:5.2f}x  "
            f"boxes changed: {changed} of {len(photos)} ({changed / len(photos):.1%})"
        )


if __name__ == "__main__":
    main()
