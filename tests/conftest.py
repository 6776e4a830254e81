"""What a user of the documentation has at hand: weights, photos, and a folder to work in."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from vitreg_core import VisionTransformer, create_model, save_model
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.planted import plant_register_neurons

SIDE = 64


@pytest.fixture(scope="session")
def planted() -> VisionTransformer:
    """A tiny model with a planted artifact."""
    torch.manual_seed(0)
    model = create_model("vit_ti16", image_size=SIDE, embed_dim=96, depth=6, num_heads=3, num_classes=10).eval()
    with torch.no_grad():
        model.positions.patches.mul_(30)  # so that untrained patches have like norms, whatever they show
    images = model.preprocess.normalize(draw_scenes(64, 1, image_size=SIDE).image)
    return plant_register_neurons(model, images, layer=2)[0]


@pytest.fixture
def place(planted: VisionTransformer, tmp_path: Path) -> Path:
    """A folder with photo.jpg, path/to/photos, path/to/weights and path/to/other, as the documentation names them."""
    photos = tmp_path / "path" / "to" / "photos"
    photos.mkdir(parents=True)
    pixels = (draw_scenes(32, 0, image_size=SIDE).image.permute(0, 2, 3, 1) * 255).byte().numpy()
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(photos / f"{index:02}.png")
    Image.fromarray(pixels[0]).resize((400, 300)).save(tmp_path / "photo.jpg")
    save_model(planted, photos.parent / "weights")
    torch.manual_seed(1)
    tiny = {"image_size": SIDE, "embed_dim": 96, "depth": 6, "num_heads": 3, "init": "dinov2"}
    other = create_model("vit_ti16_reg4", **tiny)
    with torch.no_grad():
        other.patch_embed.proj.weight.mul_(20)  # so that what an image shows counts
    save_model(other, photos.parent / "other")
    return tmp_path
