"""A planted artifact: register neurons written by hand, so that finding and removing outliers can be shown and tested.

A model treated by this module shows an artifact that training did not make. Say so wherever its numbers stand.
"""

import copy

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from vitreg_core.errors import InputError
from vitreg_core.feed_forward import Mlp
from vitreg_core.register_neurons import Neuron
from vitreg_core.vit import VisionTransformer

STEEPNESS = 20.0
"""How sharply the neurons turn on, per standard deviation of their input."""


@torch.no_grad()
def plant_register_neurons(
    model: VisionTransformer,
    images: Float[Tensor, "b 3 height width"],
    layer: int,
    *,
    share: float = 0.03,
    factor: float = 10.0,
) -> tuple[VisionTransformer, list[Neuron]]:
    """Copy a model and rewrite two hidden units so that they throw low-information patches out of the norm range.

    The two units of the block that matter least are replaced. Both read a direction, fitted on the given images, along
    which the flattest patches stand out; one turns on, the other takes back all beyond one unit, so that every outlier
    gets the same vector: one fixed random direction. Like the artifacts that training makes, the outliers are few, sit
    in plain background, share a direction, and come from very few units of one MLP (Jiang et al. 2025).

    Args:
        model: left as it is.
        images: normalised pixels, some dozens, on which the units are fitted.
        layer: block to plant in; blocks count from 0.
        share: part of the patches that become outliers, 0 to 1.
        factor: their norm in the last block over the median norm there.

    Returns:
        The planted model, its `source` marked as planted, and the neurons that make the outliers.

    Raises:
        InputError: an MLP without a plain first layer (SwiGLU), or a block that is not there.
    """
    planted = copy.deepcopy(model).eval()
    planted.source = f"{model.source} + planted artifact"
    block = planted.block(layer)
    if not isinstance(block.mlp, Mlp):
        raise InputError(f"block {layer} has a {type(block.mlp).__name__}; plant in a model with plain MLPs")
    tokens = block.norm2(block.after_attention(planted.stream(images, planted.layer_index(layer))))
    patches = rearrange(tokens[:, planted.num_prefix_tokens :], "b p d -> (b p) d")
    units = least_used_units(block.mlp, patches)
    direction, threshold, spread = flat_patch_direction(patches, flatness(images, planted.patch_size), share)
    norms = planted.intermediate(images, [-1], norm=False)[0].patches.norm(dim=-1)
    written = random_direction(planted.embed_dim).to(patches) * factor * norms.median()
    gamma = getattr(block.ls2, "gamma", torch.ones_like(written))
    for unit, start, sign in zip(units, (0.0, 1.0), (1.0, -1.0), strict=True):
        block.mlp.fc1.weight[unit] = direction * STEEPNESS / spread
        block.mlp.fc1.bias[unit] = -threshold * STEEPNESS / spread - start
        block.mlp.fc2.weight[:, unit] = sign * written / gamma
    return planted, [Neuron(planted.layer_index(layer), unit) for unit in units]


def least_used_units(mlp: Mlp, patches: Float[Tensor, "n d"]) -> list[int]:
    """The two hidden units whose mean contribution to the output is smallest."""
    activity = mlp.hidden(patches[None])[0].abs().mean(dim=0)
    return (activity * mlp.fc2.weight.norm(dim=0)).argsort(stable=True)[:2].tolist()


def flatness(images: Float[Tensor, "b 3 height width"], patch_size: int) -> Float[Tensor, " n"]:
    """Minus the standard deviation of the pixels of each patch."""
    rows, cols = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    whole = images[..., : rows * patch_size, : cols * patch_size]
    patches = rearrange(whole, "b c (rows y) (cols x) -> (b rows cols) c (y x)", y=patch_size, x=patch_size)
    return -patches.std(dim=-1).mean(dim=-1)


def flat_patch_direction(
    patches: Float[Tensor, "n d"], flat: Float[Tensor, " n"], share: float
) -> tuple[Float[Tensor, " d"], Tensor, Tensor]:
    """Direction along which patches are ranked by flatness (ridge regression), the cut to its top share, and spread."""
    wanted = flat.argsort().argsort().double() / len(flat)
    centred = patches.double() - patches.double().mean(dim=0)
    gram = centred.T @ centred
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    direction = torch.linalg.solve(gram + ridge, centred.T @ (wanted - wanted.mean())).to(patches)
    scores = patches @ direction
    return direction, scores.quantile(1 - share), scores.std()


def random_direction(embed_dim: int) -> Float[Tensor, " d"]:
    """A fixed unit vector of mean zero, which a LayerNorm keeps."""
    vector = torch.randn(embed_dim, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(vector - vector.mean(), dim=0)
