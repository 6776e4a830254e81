"""Image search by class tokens, with vitreg-core alone: the nearest images of a folder to a picture.

python examples/image_search.py                                   # on drawn scenes, with random weights
python examples/image_search.py SOURCE path/to/photos photo.jpg   # the five nearest photos, and their cosines
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from vitreg_core import VisionTransformer, load_model
from vitreg_core.data.images import list_images, read_image
from vitreg_core.data.scenes import TEXTURES, draw_scenes

BATCH, NEAREST, SCENES = 16, 5, 96


@torch.inference_mode()
def index(model: VisionTransformer, images: Tensor) -> Tensor:
    """Class tokens of length 1; for a model without a class token, mean patches."""
    found = []
    for batch in images.split(BATCH):
        features = model(batch)
        found.append(features.patches.mean(dim=1) if features.cls is None else features.cls)
    return F.normalize(torch.cat(found), dim=-1)


def search_folder(model: VisionTransformer, folder: Path, query: Path) -> None:
    """Print the nearest images of a folder to one picture."""
    paths = list_images(folder)
    tokens = index(model, torch.stack([model.preprocess(read_image(path)) for path in paths]))
    cosines = (tokens @ index(model, model.preprocess(read_image(query))[None]).T)[:, 0]
    for place in cosines.argsort(descending=True)[:NEAREST].tolist():
        print(f"{cosines[place]:.3f}  {paths[place]}")


def search_scenes(model: VisionTransformer) -> None:
    """Print how many of the nearest scenes have the texture of the one that is looked for."""
    scenes = draw_scenes(SCENES, 0, image_size=model.preprocess.config.image_size)
    tokens = index(model, model.preprocess.normalize(scenes.image))
    nearest = (tokens @ tokens.T).fill_diagonal_(-1).topk(NEAREST).indices
    share = (scenes.label[nearest] == scenes.label[:, None]).float().mean()
    chance = 1 / len(TEXTURES)
    print(f"{model.source}: {share:.2f} of the {NEAREST} nearest scenes show its texture, by chance {chance:.2f}")


if __name__ == "__main__":
    model = load_model(sys.argv[1] if len(sys.argv) > 1 else "vit_ti16_reg4").eval()
    if len(sys.argv) > 3:
        search_folder(model, Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        search_scenes(model)
