"""The losses of DINOv2, in float32 whatever the precision of the features.

With two global crops, `n` local ones and Z = 2 + 2 n, the loss is 1/Z of the cross-entropies between crops, plus KoLeo
on each global crop, plus iBOT on the masked patches (DINOv2, section 4).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

STUDENT_TEMPERATURE = 0.1
EPSILON = 1e-8


def wide(values: Tensor) -> Tensor:
    """The values in float32, or in float64 where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cross_entropy(
    student: Float[Tensor, "*n k"], teacher: Float[Tensor, "*n k"], temperature: float = STUDENT_TEMPERATURE
) -> Float[Tensor, "*n"]:
    """Cross-entropy of each row of student logits with its row of teacher targets."""
    return -(teacher * (wide(student) / temperature).log_softmax(dim=-1)).sum(dim=-1)


def dino_loss(
    teacher: Float[Tensor, "2 b k"], global_logits: Float[Tensor, "2 b k"], local_logits: Float[Tensor, "crops b k"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Loss between the class tokens of different crops of an image.

    Args:
        teacher: targets of the two global crops.
        global_logits: of the student, for the same crops in the same order; each meets the targets of the other.
        local_logits: of the student; each meets both.

    Returns:
        The local and the global part, both over Z = 2 + 2 crops.
    """
    terms = 2 + 2 * len(local_logits)
    crossed = cross_entropy(global_logits, teacher.flip(0)).mean(dim=1).sum()
    summed = teacher.sum(dim=0)  # both targets at once: the cross-entropy is linear in them
    local = cross_entropy(local_logits, summed.expand_as(local_logits)).mean(dim=1).sum() if len(local_logits) else 0.0
    return torch.as_tensor(local / terms, device=crossed.device), crossed / terms


def ibot_loss(
    teacher: Float[Tensor, "m k"], student: Float[Tensor, "m k"], weights: Float[Tensor, " m"], crops: int
) -> Float[Tensor, ""]:
    """Loss on masked patches.

    Args:
        teacher: targets of the masked patches, which the teacher sees.
        student: logits of the same patches, of which the student sees a mask token.
        weights: of each patch, one over the masked patches of its crop.
        crops: global crops of this process, with and without masks.
    """
    return (cross_entropy(student, teacher) * weights).sum() / crops


def koleo_loss(features: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Minus the mean log distance of each unit-length row to its nearest other row (KoLeo, Sablayrolles et al. 2019).

    The gradient reaches both rows of a pair. It needs two rows.
    """
    unit = F.normalize(wide(features), dim=-1, eps=EPSILON)
    with torch.no_grad():
        similarity = unit @ unit.T
        similarity.fill_diagonal_(-1.0)
        nearest = similarity.argmax(dim=1)
    distances = F.pairwise_distance(unit, unit[nearest], eps=EPSILON)
    return -(distances + EPSILON).log().mean()


def gram_loss(student: Float[Tensor, "b p d"], anchor: Float[Tensor, "b p d"]) -> Float[Tensor, ""]:
    """Mean squared difference of the cosines between patches of an image (Gram anchoring, DINOv3, section 4.2)."""
    ours, theirs = (F.normalize(wide(patches), dim=-1) for patches in (student, anchor))
    return F.mse_loss(ours @ ours.transpose(1, 2), theirs @ theirs.transpose(1, 2))


def masked_weights(masks: Bool[Tensor, "crops p"]) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """Flat positions of the masked patches, and one over the masked patches of the crop of each."""
    counts = masks.sum(dim=1).clamp_min(1)
    weights = (1.0 / counts).unsqueeze(1).expand_as(masks)[masks]
    return masks.flatten().nonzero().flatten(), weights
