"""The training of probes: which images a step sees, and a state on disk from which a stopped run goes on."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm
from vitreg_core.data.images import Preprocess
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone
from vitreg_core.precision import Precision

from vitreg_eval.datasets.examples import Examples
from vitreg_eval.extract import Extracted
from vitreg_eval.photo_augment import random_view
from vitreg_eval.prefetch import READERS, in_order
from vitreg_eval.probes import Sweep, cosine, inputs, join_tokens
from vitreg_eval.processes import Processes
from vitreg_eval.results import unwritable
from vitreg_eval.scoring import Labels
from vitreg_eval.tokens import Wanted, run

STATE = "probes.safetensors"
"""Name of the file with all probes: while they are trained, and after."""
Share = tuple[Float[Tensor, "b width"], Labels]
"""Inputs and labels of the images of a step that this process sees."""


@dataclass(frozen=True)
class Plan:
    """What the training of one set of probes depends on."""

    steps: int
    batch: int
    """Images of a step, over all processes."""
    seed: int
    save_every: int
    """Steps between two writes of the state."""
    identity: dict[str, Any]
    """Model, data and settings, in plain values: a state of others is not gone on from."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that the probes depend on."""
        known = {"steps": self.steps, "batch": self.batch, "seed": self.seed, **self.identity}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def train_probes(
    sweep: Sweep, batches: Callable[[int], Iterator[Share]], plan: Plan, out: Path, group: Processes
) -> list[str]:
    """Train all probes, from the state in `out` if it is one of the same plan.

    Args:
        sweep: at its random start.
        batches: what this process sees at a step and all after it.
        plan: how long and what for.
        out: folder of the state, which the first process writes.
        group: the processes that share each step.

    Returns:
        What the reader must know of the state that was there.

    Raises:
        InputError: the state is that of another training, which was stopped, or it cannot be written.
    """
    start, notes = restore(sweep, plan, out / STATE) if group.rank == 0 else (0, [])
    if group.size > 1:
        start = spread(sweep, start)
    steps = tqdm(range(start, plan.steps), desc="probes", unit="step", disable=None, leave=False)
    for step, (x, labels) in zip(steps, batches(start), strict=False):
        sweep.step(x, labels, cosine(step, plan.steps), group.size)
        done = step + 1
        if group.rank == 0 and (done % plan.save_every == 0 or done == plan.steps):
            save(sweep, plan, done, out / STATE)
    return notes


def spread(sweep: Sweep, step: int) -> int:
    """Give the state of the first process to all, and the step that it is at."""
    at = torch.tensor(step, device=sweep.scaled_rates.device)
    for tensor in (at, *sweep.state().values()):
        torch.distributed.broadcast(tensor, 0)
    return int(at)


def save(sweep: Sweep, plan: Plan, step: int, path: Path) -> None:
    """Write the state, whole or not at all.

    Raises:
        InputError: it cannot be written; what stood there is left as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in sweep.state().items()}
    about = {"step": str(step), "steps": str(plan.steps), "plan": plan.fingerprint}
    try:
        temporary.write_bytes(safetensors.torch.save(tensors, about))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from None


def restore(sweep: Sweep, plan: Plan, path: Path) -> tuple[int, list[str]]:
    """Read the state of the same plan into the sweep.

    Returns:
        The step it was at, 0 where there is none to go on from, and what the reader must know of it.

    Raises:
        InputError: it is that of another plan, whose training was stopped: hours of work may be in it.
    """
    if not path.exists():
        return 0, []
    damaged = 0, [f"{path.name} of an earlier training could not be read, and was replaced"]
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError):
        return damaged
    step, steps = (int(word) if (word := about.get(name, "")).isdecimal() else 0 for name in ("step", "steps"))
    if about.get("plan") != plan.fingerprint:
        if step < steps:
            raise InputError(
                f"{path}: step {step:,} of {steps:,} of a stopped training of another model, data or settings; "
                "give another --out, or delete it"
            )
        return 0, [f"{path.name} of another model, data or settings was there, and was replaced"]
    state = sweep.state()
    if {name: tensor.shape for name, tensor in found.items()} != {name: tensor.shape for name, tensor in state.items()}:
        return damaged
    for name, tensor in found.items():
        state[name].copy_(tensor)
    return min(step, plan.steps), [f"training went on from step {step:,}"]


# Which images


@lru_cache(maxsize=2)
def order(count: int, seed: int, epoch: int) -> Int[np.ndarray, " count"]:
    """The training images of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def drawn(step: int, plan: Plan, count: int) -> Int[Tensor, " batch"]:
    """Training images of a step: every epoch is a permutation, and batches run on from one to the next."""
    places = np.arange(step * plan.batch, (step + 1) * plan.batch)
    epochs = range(places[0] // count, places[-1] // count + 1)
    parts = [order(count, plan.seed, epoch)[places[places // count == epoch] % count] for epoch in epochs]
    return torch.from_numpy(np.concatenate(parts))


def cached_batches(
    extracted: Extracted, labels: Labels, rest: Int[Tensor, " rest"], plan: Plan, group: Processes, device: torch.device
) -> Callable[[int], Iterator[Share]]:
    """Features of the images that are not held out."""

    def batches(start: int) -> Iterator[Share]:
        for step in range(start, plan.steps):
            rows = rest[drawn(step, plan, len(rest))][group.rank :: group.size]
            yield inputs(extracted, rows).to(device), labels[rows].to(device)

    return batches


@dataclass(frozen=True)
class Views:
    """Random views of the images that are not held out, through the model at every step."""

    backbone: Backbone
    examples: Examples
    rest: Int[Tensor, " rest"]
    wanted: Wanted
    precision: Precision
    at_once: int
    """Images per forward pass."""

    def view(self, seed: int, place: int, image: int) -> Float[Tensor, "3 size size"]:
        """One image as the training sees it at one place of its run."""
        preprocess: Preprocess = self.backbone.preprocess
        return random_view(self.examples.read(image), preprocess, np.random.default_rng((seed, 1, place)))

    def tokens(self, images: Float[Tensor, "b 3 size size"]) -> Float[Tensor, "b width"]:
        """What probes read of a batch."""
        parts = [run(self.backbone, part, self.precision, self.wanted)[0] for part in images.split(self.at_once)]
        return torch.cat([join_tokens(part) for part in parts])

    def batches(self, plan: Plan, group: Processes) -> Callable[[int], Iterator[Share]]:
        """Inputs and labels of a step and all after it; pictures are read in several threads, a step ahead."""

        def places(start: int) -> Iterator[tuple[int, int]]:
            for step in range(start, plan.steps):
                numbered = enumerate(self.rest[drawn(step, plan, len(self.rest))].tolist(), step * plan.batch)
                yield from list(numbered)[group.rank :: group.size]

        def prepare(item: tuple[int, int]) -> tuple[int, Tensor]:
            return item[1], self.view(plan.seed, *item)

        def batches(start: int) -> Iterator[Share]:
            own = len(range(group.rank, plan.batch, group.size))
            read = in_order(prepare, places(start), threads=READERS, ahead=own)
            for _ in range(start, plan.steps):
                images, pixels = zip(*(next(read) for _ in range(own)), strict=True)
                tokens = self.tokens(torch.stack(pixels))
                yield tokens, self.examples.labels[list(images)].to(tokens.device)

        return batches
