"""Losses on a batch of images and texts, exact under any number of processes.

Every process compares its own images and texts with those of all processes, and the gradient goes back through the
exchange to whoever computed them. The mean over processes of these losses, and the mean of their gradients, which is
what DDP takes, are those of the joined batch. There is no other mode: without the gradient through the exchange the
towers would learn something else (each feature only from its own process's losses), and comparing everything
everywhere gives the same for more memory.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed
from torch.nn import functional as F
from vitreg_core.clip import Encoded


class Gather(torch.autograd.Function):
    """Rows of all processes, in their order; the gradient of a row is the sum of what all processes say of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # noqa: ANN401 (torch's)
        """Exchange the rows, of which every process has as many."""
        ctx.own = len(rows)
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401 (torch's)
        """Add up the gradients, and keep those of the own rows."""
        summed = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
        return summed.split(ctx.own)[distributed.get_rank()]


def everyones(encoded: Encoded) -> tuple[Encoded, int]:
    """Images and texts of all processes, and the place of this process's first one among them."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return encoded, 0
    images, texts = Gather.apply(torch.stack(list(encoded), dim=1)).unbind(1)
    return Encoded(images, texts), distributed.get_rank() * len(encoded.images)


def clip_loss(encoded: Encoded, scale: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], Float[Tensor, "b n"]]:
    """Cross-entropy of finding the text of an image and the image of a text in the batch, halved (CLIP, figure 3).

    Args:
        encoded: images and texts of this process, of unit length.
        scale: factor on the cosines.

    Returns:
        The mean over this process's pairs, and the logits of its images for the texts of all processes.
    """
    others, first = everyones(encoded)
    places = torch.arange(len(encoded.images), device=scale.device) + first
    per_image = scale * encoded.images @ others.texts.T
    per_text = scale * encoded.texts @ others.images.T
    return (F.cross_entropy(per_image, places) + F.cross_entropy(per_text, places)) / 2, per_image


def siglip_loss(
    encoded: Encoded, scale: Float[Tensor, ""], bias: Float[Tensor, ""]
) -> tuple[Float[Tensor, ""], Float[Tensor, "b n"]]:
    """Log-sigmoid of every pair of an image and a text, whether they belong together or not (SigLIP, section 3).

    Args:
        encoded: images and texts of this process, of unit length.
        scale: factor on the cosines.
        bias: added to them.

    Returns:
        The sum over texts, as a mean over this process's images, and their logits for the texts of all processes.
    """
    others, first = everyones(encoded)
    logits = scale * encoded.images @ others.texts.T + bias
    signs = torch.full_like(logits, -1.0)
    signs.diagonal(first).fill_(1.0)
    return -F.logsigmoid(signs * logits).sum() / len(logits), logits


def accuracy(logits: Float[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Share of this process's images whose own text has the greatest logit."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    places = torch.arange(len(logits), device=logits.device) + rank * len(logits)
    return (logits.argmax(dim=1) == places).float().mean()
