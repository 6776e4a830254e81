"""Finding the register neurons of any model: rank hidden units by how they single out outliers, choose how many."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from vitreg_core.backbones.adapter import Adapter
from vitreg_core.capturing import find, find_anatomy
from vitreg_core.edited import Batches, batches_of, original, with_test_time_registers
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone
from vitreg_core.outliers import Outliers, checked, find_outliers
from vitreg_core.register_neurons import Neuron, RegisterNeurons, Step
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights.files import weights_hash

LEAST_IMAGES = 16
"""Below so many, `find_outliers` has no mixture to fit and a score rests on a handful of outliers."""
MOST_NEURONS = 64
MOST_TOKENS = 8
PIECE_BYTES = 2**28
"""What the attention weights or the hidden units of one block may take, of the images that run at once."""


@torch.no_grad()
def find_register_neurons(
    model: nn.Module | Backbone,
    images: Batches,
    *,
    remaining: float = 0.1,
    guard: float = 0.98,
    tokens: int | None = None,
) -> RegisterNeurons:
    """Find the hidden units that write a model's outliers, and how many of them to move to test-time registers.

    Outliers are marked by the rule of `find_outliers`. A unit's score is its mean activation at outliers minus that at
    other patches, over the standard deviation at the latter; units are searched from a quarter of the depth up to the
    block in which outliers appear (Jiang et al. 2025, arXiv 2506.08010, section 3, with contrast in place of their mean
    activation). The smallest number is taken, by doubling and bisection, after which no outlier mode and no more than
    `remaining` of the outliers are left, or no more than that if there is no such number, while the class token stays
    close to that of the unedited model.

    Memory does not grow with the number of images, but for one norm per patch and block. It takes some ten passes.

    Args:
        model: ours, or one that `as_backbone` takes, in evaluation mode; left as it is.
        images: normalised pixels, 100 to 1,000 of the kind the model is for: a tensor, or batches of one size that can
            be gone through several times in the same order, such as a list.
        remaining: part of the outliers that may remain, 0 to 1.
        guard: least mean cosine of the class token to that of the unedited model; of the mean patch without one.
        tokens: test-time registers; as many as outliers in a typical image that has some, at most 8, if left out.

    Returns:
        The neurons and what they do. Without outliers there are none, and where the aims cannot be met the result says
        so (`met`) and holds what came closest.

    Raises:
        InputError: fewer than 16 images, hidden units that cannot be reached, or a model that was edited before.
    """
    backbone = original(model)
    base = observe(backbone, images)
    if len(base.read) < LEAST_IMAGES:
        raise InputError(
            f"{len(base.read)} calibration images; give {LEAST_IMAGES} at least, 100 to 1,000 for good scores"
        )
    verdicts = [find_outliers(norms) for norms in base.norms]
    block = mark(verdicts)
    nothing = replace(no_neurons(verdicts, block, backbone, len(base.read)), remaining=remaining, guard=guard)
    if block is None or nothing.cut is None:
        return nothing
    last, outliers = appearance(verdicts, block), verdicts[block]
    ranking = rank(backbone, images, outliers.mask, range(min(backbone.depth // 4, last), last + 1))
    count = typical(outliers.mask) if tokens is None else tokens
    trial = Trial(backbone, images, base, ranking, count, block, nothing.cut)
    return best_of(trial, nothing)


def no_neurons(
    verdicts: Sequence[Outliers], block: int | None, model: VisionTransformer | Adapter, images: int
) -> RegisterNeurons:
    """What is known before any neuron is chosen."""
    outliers = verdicts[-1 if block is None else block]
    return RegisterNeurons(
        neurons=(),
        scores=(),
        tokens=1,
        steps=(),
        before=0.0,
        after=0.0,
        cosine=1.0,
        met=False,
        cut=None if block is None else outliers.cut,
        cutoff=None if block is None else outliers.cutoff,
        outlier_block=block,
        emergence_block=None if block is None else appearance(verdicts, block),
        rule=outliers.rule,
        images=images,
        source=model.source,
        weights=weights_hash(model),
        remaining=0.0,
        guard=0.0,
    )


def best_of(trial: "Trial", result: RegisterNeurons) -> RegisterNeurons:
    """The result with the best number of neurons of a ranking."""
    before = trial.above(trial.base.norms[trial.block])
    limit = result.remaining * before
    steps = search(trial, len(trial.ranking), limit, result.guard)
    best = choose(steps, limit, result.guard)
    return replace(
        result,
        neurons=tuple(neuron for neuron, _ in trial.ranking[: best.neurons]),
        scores=tuple(score for _, score in trial.ranking[: best.neurons]),
        tokens=trial.tokens,
        steps=tuple(steps),
        before=before,
        after=best.fraction,
        cosine=best.cosine,
        met=best.fraction <= limit and best.cosine >= result.guard,
    )


@dataclass(frozen=True)
class Observed:
    """What a model gives for all images."""

    norms: Float[Tensor, "depth images p"]
    """Patch norms after every block, before the final norm."""
    read: Float[Tensor, "images d"]
    """What is read from each image after the final norm: the class token, or the mean patch."""


def observe(model: VisionTransformer | Adapter, images: Batches) -> Observed:
    """Run a model over all images, a few at a time; of the tokens of a block nothing stays but their norms."""
    norms, read = [], []
    for piece in pieces(model, images):
        with block_norms(model) as seen:
            features = model.features(piece.to(model.device))
        norms.append(torch.stack(seen)[..., model.num_prefix_tokens :].cpu())
        read.append((features.patches.mean(dim=1) if features.cls is None else features.cls).float().cpu())
    if not read:
        raise InputError(f"0 calibration images; give {LEAST_IMAGES} at least, 100 to 1,000 for good scores")
    if len({part.shape[2] for part in norms}) > 1:
        raise InputError("calibration images of several sizes; give images of one size")
    return Observed(torch.cat(norms, dim=1), torch.cat(read))


def pieces(model: VisionTransformer | Adapter, images: Batches) -> Iterator[Float[Tensor, "_ 3 _ _"]]:
    """All images in order, as many at once as `PIECE_BYTES` allows, one at least."""
    for batch in batches_of(images):
        tokens = model.num_prefix_tokens + batch.shape[-2] * batch.shape[-1] // model.patch_size**2
        widest = max(model.num_heads * tokens, 8 * model.embed_dim)  # the packed layer of SwiGLU has 16/3 of the width
        yield from batch.split(max(1, PIECE_BYTES // (4 * tokens * widest)))


@contextmanager
def block_norms(model: VisionTransformer | Adapter) -> Iterator[list[Float[Tensor, "b n"]]]:
    """L2 norms, in float32, of all tokens after every block of one forward pass."""
    norms: list[Float[Tensor, "b n"]] = []

    def measure(_block: nn.Module, _inputs: object, tokens: Float[Tensor, "b n d"]) -> None:
        norms.append(torch.linalg.vector_norm(tokens.float(), dim=-1))

    with ExitStack() as stack:
        for block in find_anatomy(model).blocks:
            stack.callback(block.register_forward_hook(measure).remove)
        yield norms


@dataclass(frozen=True)
class Trial:
    """Editing a model with the first neurons of a ranking, to see what remains."""

    model: VisionTransformer | Adapter
    images: Batches
    base: Observed
    """Of the unedited model."""
    ranking: Sequence[tuple[Neuron, float]]
    tokens: int
    block: int
    """After which norms are taken."""
    cut: float
    """Log of the norm, over the median norm of its image in the unedited model, above which a token counts."""

    def __call__(self, number: int) -> Step:
        """Move the first so many."""
        edited = with_test_time_registers(self.model, [neuron for neuron, _ in self.ranking[:number]], self.tokens)
        seen = observe(edited, self.images)
        norms = seen.norms[self.block]
        cosine = torch.cosine_similarity(seen.read, self.base.read, dim=-1).mean().item()
        return Step(number, self.above(norms), find_outliers(norms).found, cosine)

    def above(self, norms: Float[Tensor, "images p"]) -> float:
        """Part of the patch tokens above the cut, each over the median that its image has in the unedited model."""
        medians = np.median(np.log(checked(self.base.norms[self.block])), axis=1, keepdims=True)
        return float((np.log(checked(norms)) - medians > self.cut).mean())


def mark(verdicts: Sequence[Outliers]) -> int | None:
    """The block after which outliers are marked: the last, or without a mode there that of the highest; or None."""
    modes = {layer: verdict.ratio or 0.0 for layer, verdict in enumerate(verdicts) if verdict.mask.any()}
    last = len(verdicts) - 1
    return last if last in modes else max(modes, key=lambda layer: modes[layer], default=None)


def appearance(verdicts: Sequence[Outliers], block: int) -> int:
    """First block that marks half of a later block's outliers, as does every block between.

    An earlier mode of other tokens, which some models have, is none of these outliers.
    """
    outliers = verdicts[block].mask
    first = block
    while first and (verdicts[first - 1].mask & outliers).sum() * 2 >= outliers.sum():
        first -= 1
    return first


def typical(mask: Bool[Tensor, "images p"]) -> int:
    """Mean number of outliers in images that have some, rounded, from 1 to 8."""
    counts = mask.sum(dim=1)
    return min(max(round(counts[counts > 0].double().mean().item()), 1), MOST_TOKENS)


class Contrast:
    """Sums over the hidden units that one linear layer reads, apart for outliers and other patches."""

    def __init__(self, mask: Bool[Tensor, "images p"]) -> None:
        self.mask = mask
        self.images = 0
        self.at_outliers: Tensor = torch.zeros((), dtype=torch.float64)  # each becomes one number per unit
        self.elsewhere = self.squares = self.at_outliers

    def __call__(self, linear: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG002 (torch's signature)
        """Add the patches of some images, which stand last in the sequence; in float64, one image after another."""
        for hidden in args[0]:
            mask = self.mask[self.images].to(hidden.device)
            self.images += 1
            patches = hidden[-len(mask) :]
            outliers, others = patches[mask].double(), patches[~mask].double()
            self.at_outliers = self.at_outliers.to(hidden.device) + outliers.sum(dim=0)
            self.elsewhere = self.elsewhere.to(hidden.device) + others.sum(dim=0)
            self.squares = self.squares.to(hidden.device) + others.square().sum(dim=0)

    @property
    def scores(self) -> Float64[Tensor, " hidden"]:
        """Score of each unit; one that hardly varies elsewhere counts as if it did so by .001 of the average unit."""
        outliers, others = int(self.mask.sum()), int((~self.mask).sum())
        mean = self.elsewhere / others
        std = (self.squares / others - mean.square()).clamp(min=0).sqrt()
        return (self.at_outliers / outliers - mean) / std.clamp(min=max(1e-3 * std.mean().item(), 1e-12))


def rank(
    model: VisionTransformer | Adapter, images: Batches, mask: Bool[Tensor, "images p"], layers: range
) -> list[tuple[Neuron, float]]:
    """Hidden units of some blocks with their scores, highest first, as many as may be chosen.

    Raises:
        InputError: a block whose hidden units cannot be reached.
    """
    anatomy, contrasts = find_anatomy(model), [Contrast(mask) for _ in layers]
    with ExitStack() as stack:
        for layer, contrast in zip(layers, contrasts, strict=True):
            linear = find(anatomy.blocks[layer], anatomy.hidden_path, "hidden units")
            stack.callback(linear.register_forward_pre_hook(contrast).remove)
        for piece in pieces(model, images):
            model.features(piece.to(model.device))
    scores = torch.stack([contrast.scores for contrast in contrasts]).cpu().numpy()
    order = np.argsort(-scores, axis=None, kind="stable")[:MOST_NEURONS]
    places = zip(*np.unravel_index(order, scores.shape), strict=True)
    return [(Neuron(layers[int(row)], int(unit)), float(scores[row, unit])) for row, unit in places]


def choose(steps: Sequence[Step], limit: float, guard: float) -> Step:
    """The step to take: clean, at least below the limit, or else what comes closest; the fewest neurons of those."""
    guarded = [step for step in steps if step.cosine >= guard]
    low = [step for step in guarded if step.fraction <= limit]
    clean = [step for step in low if not step.found]
    if low:
        return (clean or low)[0]
    if guarded:
        return min(guarded, key=lambda step: step.fraction)
    return max(steps, key=lambda step: step.cosine)


def search(try_first: Callable[[int], Step], most: int, limit: float, guard: float) -> list[Step]:
    """Try numbers of neurons: double until the outliers are gone or the guard is hit, then bisect; ascending."""
    tried: dict[int, Step] = {}

    def clean(number: int) -> bool:
        tried[number] = try_first(number)
        return tried[number].fraction <= limit and not tried[number].found

    low, high = 0, 1
    while not clean(high) and high < most and tried[high].cosine >= guard:
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if clean(middle) else (middle, high)
    return [tried[number] for number in sorted(tried)]
