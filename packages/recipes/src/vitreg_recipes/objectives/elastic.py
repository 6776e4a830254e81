"""Elastic registers: every step trains with some of them, and none may look where another does."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from vitreg_core.attention import Attention, Groups, Rotation
from vitreg_core.vit import VisionTransformer

from vitreg_recipes.config import ElasticConfig, TrainConfig
from vitreg_recipes.data import Batch
from vitreg_recipes.objectives.classify import Classifier, Classify

STREAM = 7  # tells these numbers from others that are drawn from the seed and a step


class Judged(NamedTuple):
    """What the network gives for a batch."""

    logits: Float[Tensor, "b classes"]
    diversity: Float[Tensor, ""]
    """How alike the attention maps of the registers are, 0 to 1; 0 without a pair, or where it is not asked for."""


class ElasticClassifier(nn.Module):
    """Logits of a model with its first registers alone, and how alike these are, from one pass."""

    def __init__(self, vit: VisionTransformer, penalty: Literal["correlation", "orthogonality"] | None) -> None:
        super().__init__()
        self.vit = vit
        self.penalty = penalty

    def forward(self, images: Float[Tensor, "b 3 height width"], registers: int) -> Judged:
        """Judge a batch of images with the first few registers."""
        vit = self.vit.with_registers(registers)
        if self.penalty is None or registers < 2:
            return Judged(vit.classify(images), images.new_zeros(()))
        last, maps = vit.block(-1), list[Tensor]()
        tokens = vit.stream(images, vit.depth - 1)

        def look(attention: Attention, arguments: tuple[Tensor, Rotation | None, Groups]) -> None:
            maps.append(register_maps(attention, *arguments[:2], vit.prefix))

        with last.attn.register_forward_pre_hook(look):  # within the block, where FSDP has joined its weights
            tokens = last(tokens, vit.rotation(images))
        return Judged(vit.forward_head(vit.norm(tokens)), likeness(maps[0], centred=self.penalty == "correlation"))


class Elastic(Classify):
    """The DeiT-III signal with registers that are sampled, or kept apart, or both.

    With `elastic.sample` every step uses the first R' registers, R' uniform from 0 to all, the same in all processes:
    a function of the seed and the step alone.
    """

    def __init__(self, network: nn.Module, accelerator: Accelerator, num_classes: int, config: TrainConfig) -> None:
        """Take a prepared `ElasticClassifier`."""
        super().__init__(network, accelerator, num_classes, config.mix, config.loss)
        self.config = config
        self.steps = 0
        """Optimizer steps done."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Run forward and backward on a mixed batch, with drop path active.

        Returns:
            `loss`, the penalty in it included, and, where it has a weight, the penalty itself as `diversity`; without
            gradient.
        """
        self.network.train()
        images, targets = self.mix(batch)
        judged = self.network(images, self.count())
        weight = self.config.elastic.diversity
        loss = self.criterion(judged.logits, targets) + weight * judged.diversity
        self.accelerator.backward(loss)
        metrics = {"loss": loss.detach()}
        return metrics | {"diversity": judged.diversity.detach()} if weight else metrics

    def count(self) -> int:
        """Registers of this step."""
        every = self.config.model.registers
        return draw(every, self.config.seed, self.steps) if self.config.elastic.sample else every

    def after_step(self) -> None:
        """Count the step."""
        super().after_step()
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The steps done, on which the number of registers depends."""
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(values)
        self.steps = values["steps"]


def make_network(model: VisionTransformer, config: ElasticConfig) -> nn.Module:
    """What a run prepares: a plain classifier unless its registers are elastic."""
    if not config.sample and not config.diversity:
        return Classifier(model)
    return ElasticClassifier(model, config.penalty if config.diversity else None)


def make_objective(network: nn.Module, accelerator: Accelerator, num_classes: int, config: TrainConfig) -> Classify:
    """The signal for the network of `make_network`, prepared."""
    if not config.elastic.sample and not config.elastic.diversity:
        return Classify(network, accelerator, num_classes, config.mix, config.loss)
    return Elastic(network, accelerator, num_classes, config)


def draw(most: int, seed: int, step: int) -> int:
    """A number of registers from 0 to `most`, each as likely."""
    return int(np.random.default_rng((seed, step, STREAM)).integers(most, endpoint=True))


def register_maps(
    attention: Attention, tokens: Float[Tensor, "b n d"], rotation: Rotation | None, prefix: Sequence[str]
) -> Float[Tensor, "b r p"]:
    """Attention of the registers to the patches, mean over heads: the maps that the paper draws (its figure 9).

    A penalty per head would also forbid two registers to share a head that looks at one place whatever asks it. Rows of
    registers alone are computed anew from queries and keys, in float32: fused kernels keep no weights, and the small
    differences between maps are below the steps of bfloat16.
    """
    parts = attention.prepare(attention.qkv(tokens), rotation)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        queries = parts.queries[:, :, prefix.count("cls") : len(prefix)].to(wide)
        scores = queries @ parts.keys.to(wide).transpose(-2, -1) * queries.shape[-1] ** -0.5
        return scores.softmax(dim=-1)[..., len(prefix) :].mean(dim=1)


def likeness(maps: Float[Tensor, "b r p"], *, centred: bool) -> Float[Tensor, ""]:
    """Mean over images and pairs of registers of the squared cosine of their maps; of the correlation, where centred.

    Both are 1 for maps that are equal up to scale. The cosine is 0 for maps that do not overlap, the correlation for
    maps that know nothing of each other. There must be a pair.
    """
    if centred:
        maps = maps - maps.mean(dim=-1, keepdim=True)
    unit = F.normalize(maps, dim=-1)
    first, second = torch.triu_indices(maps.shape[1], maps.shape[1], offset=1, device=maps.device)
    return (unit[:, first] * unit[:, second]).sum(dim=-1).square().mean()  # no product that autocast would round
