"""Linear probes on frozen tokens: all inputs and learning rates of DINOv2 at once, one chosen on a held-out part."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from vitreg_core.features import Backbone
from vitreg_core.weights.files import weights_hash

from vitreg_eval.config import LinearOptions
from vitreg_eval.datasets import image_set, sha256
from vitreg_eval.datasets.examples import Examples, subset
from vitreg_eval.datasets.labelled import open_splits
from vitreg_eval.extract import Extracted, extract
from vitreg_eval.labelled_features import hold_out, labelled_features
from vitreg_eval.manifest import architecture_hash
from vitreg_eval.metrics import Metric, mean, measure
from vitreg_eval.probe_training import STATE, Plan, Views, cached_batches, train_probes
from vitreg_eval.probes import Probe, Sweep, layers_of, outcomes
from vitreg_eval.processes import Processes, processes
from vitreg_eval.results import DataRecord, Outcome, is_main_process, make_folder, write_json
from vitreg_eval.scoring import Labels, mean_average_precision
from vitreg_eval.tokens import Wanted

STEPS = {"dinov2": 12_500, "cached": 1_250}
PROTOCOLS = {
    "dinov2": "protocol dinov2: the model ran at every step, on random crops and flips",
    "cached": "protocol cached: trained on features of the unchanged images; published values were not",
}
VAL_SELECTED = "chosen on the data it is reported on, as the published values of DINOv2"
TABLE = "probes.json"


@dataclass(frozen=True)
class Part:
    """Some images of a set, with features."""

    extracted: Extracted
    rows: Int[Tensor, " n"]
    labels: Labels
    """Of these images."""


@dataclass(frozen=True)
class Trained:
    """Probes after their training, and what they are judged by."""

    sweep: Sweep
    held_out: Part | None
    test: Part
    notes: list[str]


def run(backbone: Backbone, options: LinearOptions, out: Path) -> Outcome:
    """Scores on the evaluation set of the probe chosen on a held-out part of train, and of the best one there."""
    group = processes(cpu=backbone.device.type == "cpu")
    make_folder(out)
    train = train_on_views if options.protocol == "dinov2" else train_on_features
    trained = train(backbone, options, out, group)
    metrics, table, chosen = judge(trained, options.seed, backbone.device)
    if is_main_process():
        write_json(out / TABLE, table)
    notes = [PROTOCOLS[options.protocol], *chosen, *trained.notes, f"all probes in {out / TABLE} and {out / STATE}"]
    return Outcome(metrics, trained.test.extracted.data, notes)


def judge(
    trained: Trained, seed: int, device: torch.device
) -> tuple[dict[str, Metric], list[dict[str, Any]], list[str]]:
    """Metrics, the scores of every probe, and which were chosen. Of equally good probes the first is taken."""
    test = judged(trained.sweep, trained.test, device)
    held = judged(trained.sweep, trained.held_out, device) if trained.held_out else {}
    value = {
        name: {probe: point(values) for probe, values in found.items()}
        for name, found in (("held_out", held), ("val", test))
    }
    best = max(test, key=value["val"].__getitem__)
    name = "map" if test[best].ndim > 1 else "top1"
    metrics = {f"{name}_val_selected": measured(test[best], seed).model_copy(update={"note": VAL_SELECTED})}
    notes = [f"{name}_val_selected is of the probe {best.name}"]
    if held:
        chosen = max(held, key=value["held_out"].__getitem__)
        metrics = {name: measured(test[chosen], seed), **metrics}
        notes.insert(0, f"{name} is of the probe {chosen.name}, chosen on held-out training images")
    columns = {column: scores for column, scores in value.items() if scores}
    table = [
        {"name": p.name, "blocks": p.kind.blocks, "avgpool": p.kind.avgpool, "lr": p.rate}
        | {column: scores[p] for column, scores in columns.items()}
        for p in test
    ]
    return metrics, table, notes


def judged(sweep: Sweep, part: Part, device: torch.device) -> dict[Probe, Tensor]:
    """What each probe says of each image of a part."""
    return outcomes(sweep, part.extracted, part.rows, part.labels, device)


def statistic(values: Shaped[Tensor, "n *more"]) -> Any:  # noqa: ANN401 (one of two functions)
    """What averages over images."""
    return mean if values.ndim == 1 else mean_average_precision


def point(values: Shaped[Tensor, "n *more"]) -> float:
    """The score alone."""
    return statistic(values)(values, torch.ones(1, len(values), dtype=torch.float64)).item()


def measured(values: Shaped[Tensor, "n *more"], seed: int) -> Metric:
    """The score with its interval."""
    return measure(values, statistic(values), seed=seed)


# Training


def wanted_of(backbone: Backbone) -> Wanted:
    """Tokens that probes read."""
    return Wanted(layers=layers_of(backbone.depth), parts=("cls", "mean_patch"))


def plan_of(backbone: Backbone, options: LinearOptions, data: str, count: int) -> Plan:
    """The length of a training on so many images, and what it depends on."""
    assert isinstance(backbone, nn.Module)
    batch = min(options.train_batch, count)
    steps = options.steps or STEPS[options.protocol]
    if options.epochs is not None:
        steps = -(-options.epochs * count // batch)
    fields = {"protocol", "label", "held_out", "precision"}
    identity = {
        "model": weights_hash(backbone),
        "architecture": architecture_hash(backbone),
        "preprocess": backbone.preprocess.config.model_dump(mode="json"),
        "data": data,
        **options.model_dump(mode="json", include=fields),
    }
    return Plan(steps, batch, options.seed, options.save_every, identity)


def new_sweep(backbone: Backbone, classes: int, plan: Plan) -> Sweep:
    """Probes at their random start."""
    layers = len(layers_of(backbone.depth))
    return Sweep(backbone.embed_dim, layers, classes, batch=plan.batch, seed=plan.seed, device=backbone.device)


def train_on_features(backbone: Backbone, options: LinearOptions, out: Path, group: Processes) -> Trained:
    """Extract the features of all images, then train on them."""
    found = labelled_features(backbone, options, wanted_of(backbone))
    train, labels = found.train, found.train.targets[options.label]
    rest, held = hold_out(len(train), options.held_out, options.seed)
    plan = plan_of(backbone, options, train.data.hash, len(rest))
    sweep = new_sweep(backbone, found.classes, plan)
    batches = cached_batches(train, labels, rest, plan, group, backbone.device)
    notes = train_probes(sweep, batches, plan, out, group)
    held_out = Part(train, held, labels[held]) if len(held) else None
    return Trained(sweep, held_out, whole(found.test, options), [*found.notes, *notes])


def train_on_views(backbone: Backbone, options: LinearOptions, out: Path, group: Processes) -> Trained:
    """Train on random views; only what is held out or reported on has features of its own."""
    splits = open_splits(options.dataset, options.data)
    rest, held = hold_out(len(splits.train), options.held_out, options.seed)
    wanted = wanted_of(backbone)
    plan = plan_of(backbone, options, splits.train.data.hash, len(rest))
    sweep = new_sweep(backbone, len(splits.train.classes), plan)
    views = Views(backbone, splits.train, rest, wanted, options.precision, options.batch_size)
    notes = train_probes(sweep, views.batches(plan, group), plan, out, group)

    def features(examples: Examples) -> Extracted:
        return extract(backbone, image_set(examples, backbone.preprocess, options.batch_size), options, wanted)

    held_out = None
    if len(held):
        record = held_out_record(splits.train.data, options, len(held))
        held_out = whole(features(subset(splits.train, held, record)), options)
    return Trained(sweep, held_out, whole(features(splits.val), options), [*splits.notes, *notes])


def whole(extracted: Extracted, options: LinearOptions) -> Part:
    """All images of a set."""
    return Part(extracted, torch.arange(len(extracted)), extracted.targets[options.label])


def held_out_record(train: DataRecord, options: LinearOptions, count: int) -> DataRecord:
    """Record of the held-out part of a set."""
    made = f"{train.hash} held out {options.held_out} seed {options.seed}"
    return DataRecord(name=train.name, split="train-held-out", n=count, hash=sha256(made))
