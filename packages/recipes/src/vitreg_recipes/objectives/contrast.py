"""CLIP's signal: every image is to find its text among those of the whole batch, and every text its image."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from vitreg_core.clip import DualEncoder, Encoded

from vitreg_recipes.contrast.config import ContrastConfig
from vitreg_recipes.contrast.data import Pairs
from vitreg_recipes.contrast.loss import accuracy, clip_loss, siglip_loss

LARGEST_SCALE = math.log(100)
"""Of the log of the factor on the cosines (CLIP, section 2.5); the smallest is 0."""


class Contrast:
    """A dual encoder and its loss over the whole batch, taken in parts where `accumulate` says so."""

    def __init__(
        self, network: nn.Module, model: DualEncoder, accelerator: Accelerator, config: ContrastConfig
    ) -> None:
        """Take the model as it was prepared for several processes, and as it is."""
        self.network = network
        self.model = model
        self.accelerator = accelerator
        self.parts = config.accumulate
        self.norm = config.optim.clip

    def step(self, batch: Pairs) -> dict[str, Tensor]:
        """Run forward and backward.

        Returns:
            `loss`; `logit_scale`, the factor on the cosines; `accuracy`, the share of images whose text is the nearest
            of the whole batch.
        """
        self.network.train()
        found = self.at_once(batch) if self.parts == 1 else self.in_parts(batch.split(self.parts))
        return {**found, "logit_scale": self.model.logit_scale.detach().exp()}

    def at_once(self, batch: Pairs) -> dict[str, Tensor]:
        """Loss and gradient of a batch that fits into memory."""
        loss, logits = self.loss(self.network(batch.images, batch.tokens))
        self.accelerator.backward(loss)
        return {"loss": loss.detach(), "accuracy": accuracy(logits.detach())}

    def in_parts(self, parts: Sequence[Pairs]) -> dict[str, Tensor]:
        """The same loss and gradient, with one part at a time in memory (GradCache, Gao et al. 2021).

        All features are computed without a gradient; the loss of the whole batch gives the gradient of each, and of
        scale and bias, once. Then every part is run again, drawing the same numbers, and takes the gradient of its
        features on. The processes exchange gradients after the last part.
        """
        device = self.accelerator.device
        random, cached = [], []
        with torch.no_grad():
            for part in parts:
                random.append(generators(device))
                cached.append(self.network(part.images, part.tokens))
        features = Encoded(*(torch.cat(sides).requires_grad_() for sides in zip(*cached, strict=True)))
        loss, logits = self.loss(features)
        shared = [value for value in (self.model.logit_scale, self.model.logit_bias) if value is not None]
        images, texts, *rest = torch.autograd.grad(loss, [*features, *shared])
        gradients = zip(images.chunk(len(parts)), texts.chunk(len(parts)), strict=True)
        for number, (part, wanted) in enumerate(zip(parts, gradients, strict=True), 1):
            last = number == len(parts)
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                with replayed(random[number - 1], device):
                    encoded = self.network(part.images, part.tokens)
                outputs, given = (*encoded, *shared * last), (*wanted, *rest * last)
                torch.autograd.backward(outputs, given)  # Accelerate's would divide by the number of parts
        return {"loss": loss.detach(), "accuracy": accuracy(logits.detach())}

    def loss(self, encoded: Encoded) -> tuple[Float[Tensor, ""], Float[Tensor, "b n"]]:
        """Loss of this process's part of the batch, and logits of its images; in the precision of the features."""
        scale, bias = self.model.logit_scale.exp(), self.model.logit_bias
        return clip_loss(encoded, scale) if bias is None else siglip_loss(encoded, scale, bias)

    def clip(self) -> None:
        """Clip the whole gradient, where the config says so."""
        if self.norm is not None:
            clip_grad_norm_(self.model.parameters(), self.norm)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the factor on the cosines between 1 and 100."""
        self.model.logit_scale.clamp_(0.0, LARGEST_SCALE)

    def state_dict(self) -> dict[str, Any]:
        """Nothing beyond the model."""
        return {}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


def generators(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """States of the generators that drop path draws from, on the CPU and on the GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def replayed(states: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Draw as after these states inside the block, and go on as if it had drawn nothing."""
    cpu, cuda = states
    with torch.random.fork_rng([device] if cuda is not None else []):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield
