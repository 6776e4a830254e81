"""Linear classifiers on frozen tokens, one for each choice of input and learning rate, all trained at once.

The protocol of DINOv2 (Oquab et al. 2023, section 7; its released evaluation code): the class tokens of the last block,
or of the last four side by side, each with or without the mean patch token of the last block, and 13 learning rates.
SGD with momentum 0.9, cosine to 0, no weight decay. All classifiers of one input are one matrix, so that a step is two
products per input, whatever the number of learning rates.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from vitreg_eval.extract import Extracted
from vitreg_eval.scoring import Labels, pairs, right

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""Learning rates for a batch of 256."""
MOMENTUM = 0.9
LAST_BLOCKS = 4
ROWS = 1024
"""Pictures whose scores are held in memory."""


class Kind(NamedTuple):
    """What a classifier reads."""

    blocks: int
    """Last blocks whose class tokens stand side by side, the oldest first."""
    avgpool: bool
    """Whether the mean patch token of the last block follows."""


class Probe(NamedTuple):
    """One of the classifiers."""

    kind: Kind
    rate: float
    """Learning rate for a batch of 256."""

    @property
    def name(self) -> str:
        """As no other probe is called."""
        return f"blocks={self.kind.blocks} avgpool={self.kind.avgpool} lr={self.rate!r}"


def layers_of(depth: int) -> tuple[int, ...]:
    """The blocks that probes read of a model with so many: the last four, or all."""
    return tuple(range(-min(LAST_BLOCKS, depth), 0))


def inputs(extracted: Extracted, rows: Int[Tensor, " b"] | slice) -> Float[Tensor, "b width"]:
    """Class tokens of all layers side by side, then the mean patch token of the last: what all probes read parts of."""
    return join_tokens({name: extracted.parts[name][rows] for name in ("cls", "mean_patch")})


def join_tokens(tokens: Mapping[str, Float[Tensor, "b layers d"]]) -> Float[Tensor, "b width"]:
    """As `inputs`, of tokens by name."""
    return torch.cat([rearrange(tokens["cls"], "b l d -> b (l d)"), tokens["mean_patch"][:, -1]], dim=1).float()


class Sweep:
    """All probes: parameters and momenta.

    Args:
        dim: width of a token.
        layers: class tokens that are read.
        classes: outputs of each probe.
        batch: images of a step, over all processes, which learning rates are proportional to.
        seed: of the random start.
        device: where to compute.
        rates: learning rates for a batch of 256.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        classes: int,
        *,
        batch: int,
        seed: int,
        device: torch.device,
        rates: tuple[float, ...] = RATES,
    ) -> None:
        self.dim, self.layers, self.classes, self.batch, self.rates = dim, layers, classes, batch, rates
        self.kinds = [Kind(blocks, pool) for blocks in dict.fromkeys((1, layers)) for pool in (False, True)]
        self.probes = [Probe(kind, rate) for kind in self.kinds for rate in rates]
        generator = torch.Generator().manual_seed(seed)
        shapes = {kind: (len(rates) * classes, dim * (kind.blocks + kind.avgpool)) for kind in self.kinds}
        self.weights = {kind: (0.01 * torch.randn(*s, generator=generator)).to(device) for kind, s in shapes.items()}
        self.biases = {kind: torch.zeros(s[0], device=device) for kind, s in shapes.items()}
        self.momenta = {
            kind: (torch.zeros_like(self.weights[kind]), torch.zeros_like(self.biases[kind])) for kind in shapes
        }
        scaled = torch.tensor(rates, dtype=torch.float64) * (batch / 256)
        self.scaled_rates = scaled.float().repeat(classes).to(device)

    def read(self, x: Float[Tensor, "b width"], kind: Kind) -> Float[Tensor, "b part"]:
        """What a kind of probe reads."""
        return x[:, (self.layers - kind.blocks) * self.dim : (self.layers + kind.avgpool) * self.dim]

    def scores(self, x: Float[Tensor, "b width"], kind: Kind) -> Float[Tensor, "b classes rates"]:
        """Logits of all probes of a kind."""
        flat = torch.addmm(self.biases[kind], self.read(x, kind), self.weights[kind].T)
        return rearrange(flat, "b (classes rates) -> b classes rates", classes=self.classes)

    def step(self, x: Float[Tensor, "b width"], labels: Labels, factor: float, processes: int = 1) -> None:
        """One step of SGD on the mean loss over the batch, of which this process has a share.

        Args:
            x: inputs of the share.
            labels: of the share.
            factor: of the learning rates, from the schedule.
            processes: that share the batch; their gradients are added.
        """
        for kind in self.kinds:
            residual = rearrange(residuals(self.scores(x, kind), labels), "b classes rates -> b (classes rates)")
            residual /= self.batch
            weight, bias = self.momenta[kind]
            weight.addmm_(residual.T, self.read(x, kind), beta=MOMENTUM / processes)
            bias.mul_(MOMENTUM / processes).add_(residual.sum(dim=0))
            if processes > 1:
                torch.distributed.all_reduce(weight)
                torch.distributed.all_reduce(bias)
            self.weights[kind].addcmul_(weight, self.scaled_rates[:, None], value=-factor)
            self.biases[kind].addcmul_(bias, self.scaled_rates, value=-factor)

    def state(self) -> dict[str, Tensor]:
        """All tensors that training changes, by name; not copies."""
        return {
            f"blocks={kind.blocks} avgpool={kind.avgpool} {name}": tensor
            for kind in self.kinds
            for name, tensor in (
                ("weight", self.weights[kind]),
                ("bias", self.biases[kind]),
                ("weight momentum", self.momenta[kind][0]),
                ("bias momentum", self.momenta[kind][1]),
            )
        }


def residuals(scores: Float[Tensor, "b classes rates"], labels: Labels) -> Float[Tensor, "b classes rates"]:
    """Gradient by the scores of each image's loss: the cross-entropy, or the mean of the binary ones judged."""
    if labels.ndim == 1:
        chances = scores.softmax(dim=1)
        places = labels[:, None, None].expand(-1, 1, scores.shape[2])
        return chances.scatter_add_(1, places, chances.new_full((1, 1, 1), -1.0).expand_as(places))
    judged = (labels >= 0).float()[:, :, None]
    return (
        (scores.sigmoid() - (labels == 1).float()[:, :, None]) * judged / judged.sum(dim=1, keepdim=True).clamp_min(1)
    )


def cosine(step: int, steps: int) -> float:
    """Factor of the learning rate at a step: from 1 to 0 without warm-up."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def outcomes(
    sweep: Sweep, extracted: Extracted, rows: Int[Tensor, " n"], labels: Labels, device: torch.device
) -> dict[Probe, Shaped[Tensor, "n ..."]]:
    """Of every probe, whether it names each of some images, or its scores with the labels where an image has several.

    Args:
        sweep: trained.
        extracted: features.
        rows: images to look at.
        labels: of these images.
        device: where the probes are.

    Returns:
        By probe: what `mean` or `mean_average_precision` takes. A probe that has diverged names nothing.
    """
    found: dict[Probe, list[Tensor]] = {probe: [] for probe in sweep.probes}
    for part, truth in zip(torch.split(rows, ROWS), torch.split(labels, ROWS), strict=True):
        x = inputs(extracted, part).to(device)
        for kind in sweep.kinds:
            for rate, scores in zip(sweep.rates, sweep.scores(x, kind).cpu().unbind(dim=2), strict=True):
                sound, scores = scores.isfinite().all(dim=1), scores.nan_to_num()
                kept = right(scores, truth) & sound if truth.ndim == 1 else pairs(scores * sound[:, None], truth)
                found[Probe(kind, rate)].append(kept)
    return {probe: torch.cat(parts) for probe, parts in found.items()}
