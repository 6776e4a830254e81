import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import kstest
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional as F
from vitreg_core import VisionTransformer, ViTConfig
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import Preprocess
from vitreg_core.errors import InputError
from vitreg_eval import probe_training
from vitreg_eval.config import LinearOptions
from vitreg_eval.extract import Extracted
from vitreg_eval.photo_augment import random_box, random_view
from vitreg_eval.probe_training import STATE, Plan, drawn
from vitreg_eval.probes import RATES, Kind, Sweep, cosine, layers_of, outcomes
from vitreg_eval.results import DataRecord
from vitreg_eval.scoring import mean_average_precision, score
from vitreg_eval.tasks import linear

CPU = torch.device("cpu")
CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3, registers=1)
SMALL = {"train_images": 60, "test_images": 40, "train_batch": 16, "steps": 6}


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(CONFIG).eval()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of photos, dark and bright, in train and val."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 8)):
        for index in range(count):
            folder = tmp_path / "photos" / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 128, (40, 48, 3), dtype=np.uint8) + 127 * (index % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "photos"


def tokens(count: int, classes: int, seed: int, layers: int = 4, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, (layers + 1) * dim, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + torch.randn(count, (layers + 1) * dim, generator=generator), labels


def alone(sweep: Sweep, kind: Kind, index: int) -> nn.Linear:
    """One probe of a sweep, at its start."""
    layer = nn.Linear(sweep.weights[kind].shape[1], sweep.classes)
    with torch.no_grad():
        layer.weight.copy_(sweep.weights[kind][index :: len(sweep.rates)])
        layer.bias.zero_()
    return layer


@pytest.mark.parametrize("several", [False, True])
def test_every_probe_is_trained_as_if_it_were_alone(*, several: bool) -> None:
    x, labels = tokens(64, 3, 0)
    if several:
        labels = F.one_hot(labels, 3)
        labels[::5, 1] = -1
    sweep = Sweep(6, 4, 3, batch=32, seed=0, device=CPU)
    layers = {(kind, index): alone(sweep, kind, index) for kind in sweep.kinds for index in range(len(RATES))}
    assert len(layers) == len(sweep.probes) == 52
    for step in range(8):
        rows = slice(32 * (step % 2), 32 * (step % 2) + 32)
        sweep.step(x[rows], labels[rows], cosine(step, 8))
    for (kind, index), layer in layers.items():
        optimizer = torch.optim.SGD(layer.parameters(), RATES[index] * 32 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        read = slice((4 - kind.blocks) * 6, 24 + 6 * kind.avgpool)
        for step in range(8):
            rows = slice(32 * (step % 2), 32 * (step % 2) + 32)
            logits, target = layer(x[rows, read]), labels[rows]
            if several:
                judged = target >= 0
                losses = F.binary_cross_entropy_with_logits(logits, (target == 1).float(), reduction="none")
                loss = ((losses * judged).sum(dim=1) / judged.sum(dim=1)).mean()
            else:
                loss = F.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        ours = sweep.weights[kind][index :: len(RATES)]
        torch.testing.assert_close(ours, layer.weight.detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(sweep.biases[kind][index :: len(RATES)], layer.bias.detach(), rtol=0, atol=1e-6)


def test_probes_start_small_and_no_two_have_the_same_name() -> None:
    sweep = Sweep(64, 4, 10, batch=8, seed=0, device=CPU)
    for weight in sweep.weights.values():
        assert kstest(weight.flatten()[:2000].numpy() / 0.01, "norm").pvalue > 1e-3
    assert len({probe.name for probe in sweep.probes}) == 52
    assert "blocks=4 avgpool=True lr=2e-05" in {probe.name for probe in sweep.probes}
    assert torch.equal(sweep.scaled_rates[:13].double(), (torch.tensor(RATES).double() * 8 / 256).float().double())
    assert layers_of(12) == (-4, -3, -2, -1)
    assert layers_of(2) == (-2, -1)


def test_a_diverged_probe_names_nothing_and_leaves_the_others_alone() -> None:
    x, labels = tokens(50, 3, 0, layers=1)
    features = Extracted({"cls": x[:, None, :6], "mean_patch": x[:, None, 6:]}, {"label": labels}, record(50), (1, 1))
    sweep = Sweep(6, 1, 3, batch=32, seed=0, device=CPU, rates=(0.1, 0.2))
    sweep.weights[sweep.kinds[0]][1::2] = torch.nan
    found = outcomes(sweep, features, torch.arange(50), labels, CPU)
    rights = [found[probe].float().mean().item() for probe in sweep.probes]
    assert rights[1] == 0
    assert min(rights[0], *rights[2:]) > 0


def record(count: int) -> DataRecord:
    return DataRecord(name="made", split="train", n=count, hash="0")


# Precision over several classes


def test_mean_average_precision_is_that_of_scikit_learn_with_ties_and_unjudged_classes() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 20, (120, 4)) / 7.0
    truth = (generator.random((120, 4)) < 0.3).astype(np.int64)
    truth[generator.random((120, 4)) < 0.1] = -1
    expected = [average_precision_score(t[t >= 0], s[t >= 0]) for s, t in zip(scores.T, truth.T, strict=True)]
    name, metric = score(torch.from_numpy(scores), torch.from_numpy(truth), 0)
    assert name == "map"
    assert metric.value == pytest.approx(np.mean(expected), rel=1e-12)
    counts = generator.integers(0, 3, 120)
    values = torch.from_numpy(np.stack([scores, truth], axis=1))
    weighed = mean_average_precision(values, torch.from_numpy(counts)[None].double()).item()
    again = np.repeat(np.arange(120), counts)
    repeated = [
        average_precision_score(t[t >= 0], s[t >= 0]) for s, t in zip(scores[again].T, truth[again].T, strict=True)
    ]
    assert weighed == pytest.approx(np.mean(repeated), rel=1e-12)


# Batches


def plan_of(steps: int, batch: int) -> Plan:
    return Plan(steps=steps, batch=batch, seed=3, save_every=2, identity={})


def test_every_epoch_shows_every_image_once() -> None:
    plan = plan_of(10, 8)
    seen = torch.cat([drawn(step, plan, 20) for step in range(10)]).tolist()
    for epoch in range(4):
        assert sorted(seen[20 * epoch : 20 * epoch + 20]) == list(range(20))
    assert seen[:20] != seen[20:40]


def test_random_boxes_have_the_area_and_aspect_of_the_protocol() -> None:
    generator = np.random.default_rng(0)
    boxes = np.array([random_box(1000, 1000, generator) for _ in range(4000)])
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (left + width <= 1000).all() and (top >= 0).all() and (top + height <= 1000).all()
    small = width * height < 0.5e6  # larger ones do not always fit
    assert kstest((width * height)[small] / 1e6, "uniform", args=(0.08, 0.42)).pvalue > 1e-3
    assert kstest(np.log(width / height)[small], "uniform", args=(np.log(3 / 4), 2 * np.log(4 / 3))).pvalue > 1e-3
    assert random_box(1000, 10, generator)[2:] == (13, 10)


def test_a_view_is_cut_resized_flipped_and_normalised() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    preprocess = Preprocess(PreprocessConfig(image_size=32))
    flips = 0
    for seed in range(12):
        generator, twin = np.random.default_rng(seed), np.random.default_rng(seed)
        view = random_view(picture, preprocess, generator)
        left, top, width, height = random_box(60, 50, twin)
        cut = picture.crop((left, top, left + width, top + height)).resize((32, 32), Image.Resampling.BICUBIC)
        plain = preprocess.normalize(torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255)
        flipped = torch.equal(view, plain.flip(-1))
        assert flipped or torch.equal(view, plain)
        flips += flipped
    assert 2 <= flips <= 10


# The task


@pytest.mark.parametrize("protocol", ["cached", "dinov2"])
def test_both_protocols_separate_dark_from_bright(
    model: VisionTransformer, photos: Path, tmp_path: Path, protocol: str
) -> None:
    options = LinearOptions(data=photos, protocol=protocol, steps=40, train_batch=8, held_out=0.25)
    outcome = linear.run(model, options, tmp_path)
    assert outcome.metrics["top1"].value >= 0.9
    assert outcome.metrics["top1_val_selected"].value >= outcome.metrics["top1"].value
    assert "chosen on the data it is reported on" in outcome.metrics["top1_val_selected"].note
    assert outcome.metrics["top1"].note == ""
    assert outcome.notes[0].startswith(f"protocol {protocol}: ")
    table = json.loads((tmp_path / "probes.json").read_text())
    assert len(table) == 52
    best = max(table, key=lambda row: row["held_out"])
    assert best["name"] in outcome.notes[1]
    assert outcome.metrics["top1"].value == pytest.approx(best["val"])


def test_without_a_held_out_part_only_the_labelled_number_is_given(model: VisionTransformer, tmp_path: Path) -> None:
    outcome = linear.run(model, LinearOptions(**SMALL, held_out=0), tmp_path)
    assert list(outcome.metrics) == ["top1_val_selected"]


def test_the_choice_does_not_depend_on_val_and_held_out_images_are_not_trained_on(
    model: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    step = Sweep.step

    def watched(self: Sweep, x: torch.Tensor, *rest: object) -> None:
        seen.append(x.clone())
        step(self, x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Sweep, "step", watched)
    options = LinearOptions(**SMALL, held_out=0.2)
    features = linear.labelled_features(model, options, linear.wanted_of(model))
    monkeypatch.setattr(linear, "labelled_features", lambda *_: features)
    first = linear.run(model, options, tmp_path / "first")
    features.test.targets["label"].copy_(features.test.targets["label"].roll(1))
    second = linear.run(model, options, tmp_path / "second")
    assert first.notes[1] == second.notes[1]
    assert first.metrics["top1"] != second.metrics["top1"]
    rest, held = linear.hold_out(60, 0.2, 0)
    trained = {row.numpy().tobytes() for row in torch.cat(seen)}
    for rows, expected in ((held, 0), (rest, 48)):
        found = [row.numpy().tobytes() in trained for row in probe_training.inputs(features.train, rows)]
        assert sum(found) == expected


def test_shuffled_labels_give_chance(model: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within four standard deviations of a binomial variable, about its own most frequent guess."""
    options = LinearOptions(train_images=300, test_images=400, train_batch=64, steps=60)
    features = linear.labelled_features(model, options, linear.wanted_of(model))
    for split in (features.train, features.test):
        labels = torch.arange(len(split)) % 4
        split.targets["label"].copy_(labels[torch.randperm(len(split), generator=torch.Generator().manual_seed(1))])
    monkeypatch.setattr(linear, "labelled_features", lambda *_: features)
    outcome = linear.run(model, options, tmp_path)
    assert abs(outcome.metrics["top1"].value - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def stop_at(batches: Callable, last: int) -> Callable:
    def stopped(start: int) -> Iterator[object]:
        for step, batch in enumerate(batches(start), start):
            if step == last:
                raise KeyboardInterrupt
            yield batch

    return stopped


@pytest.mark.parametrize("protocol", ["cached", "dinov2"])
def test_a_stopped_training_goes_on_to_the_same_bits(
    model: VisionTransformer, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    options = LinearOptions(data=photos, protocol=protocol, steps=7, train_batch=6, save_every=2)
    whole = linear.run(model, options, tmp_path / "whole")
    train = linear.train_probes
    monkeypatch.setattr(linear, "train_probes", lambda sweep, batches, *rest: train(sweep, stop_at(batches, 5), *rest))
    with pytest.raises(KeyboardInterrupt):
        linear.run(model, options, tmp_path / "stopped")
    monkeypatch.undo()
    again = linear.run(model, options, tmp_path / "stopped")
    assert "training went on from step 4" in again.notes
    assert again.metrics == whole.metrics
    for name, tensor in load_file(tmp_path / "whole" / STATE).items():
        assert torch.equal(tensor, load_file(tmp_path / "stopped" / STATE)[name])


def test_a_state_of_another_training_or_a_damaged_one_is_not_gone_on_from(
    model: VisionTransformer, tmp_path: Path
) -> None:
    linear.run(model, LinearOptions(**SMALL), tmp_path)
    other = linear.run(model, LinearOptions(**SMALL, seed=1), tmp_path)
    assert not [note for note in other.notes if "went on" in note]
    assert f"{STATE} of another model, data or settings was there, and was replaced" in other.notes
    (tmp_path / STATE).write_bytes(b"\x10\0\0\0\0\0\0\0{no json at all}")
    fresh = linear.run(model, LinearOptions(**SMALL, seed=1), tmp_path)
    assert f"{STATE} of an earlier training could not be read, and was replaced" in fresh.notes
    assert fresh.metrics == other.metrics


def test_a_stopped_training_is_not_thrown_away_for_another(
    model: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = linear.train_probes
    monkeypatch.setattr(linear, "train_probes", lambda sweep, batches, *rest: train(sweep, stop_at(batches, 5), *rest))
    with pytest.raises(KeyboardInterrupt):
        linear.run(model, LinearOptions(**SMALL, save_every=2), tmp_path)
    monkeypatch.undo()
    before = (tmp_path / STATE).read_bytes()
    for other in (LinearOptions(**SMALL, seed=1), LinearOptions(**{**SMALL, "steps": 4})):
        with pytest.raises(InputError, match=r"probes.safetensors: step 4 of 6 of a stopped training of another model"):
            linear.run(model, other, tmp_path)
    assert (tmp_path / STATE).read_bytes() == before


def test_probes_of_a_model_that_computes_otherwise_are_not_gone_on_from(model: VisionTransformer) -> None:
    plan = linear.plan_of(model, LinearOptions(), "data", 54)
    assert plan == linear.plan_of(model, LinearOptions(), "data", 54)
    model.blocks[0].norm1.eps *= 2
    assert plan.fingerprint != linear.plan_of(model, LinearOptions(), "data", 54).fingerprint


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InputError, match="--steps 3 with --epochs 2: leave one of them out"):
        LinearOptions(steps=3, epochs=2).needs()
    with pytest.raises(InputError, match="--protocol dinov2 crops photos at random: give --data DIR"):
        LinearOptions(protocol="dinov2").needs()


def test_epochs_are_passes_over_what_is_not_held_out(model: VisionTransformer) -> None:
    options = LinearOptions(epochs=3, train_batch=16)
    assert linear.plan_of(model, options, "data", 54).steps == 11
    assert linear.plan_of(model, LinearOptions(), "data", 54).steps == 1250
    assert linear.plan_of(model, LinearOptions(protocol="dinov2"), "data", 54).steps == 12500
    assert linear.plan_of(model, LinearOptions(), "data", 54).batch == 54


def test_an_image_in_train_and_val_is_refused(model: VisionTransformer, photos: Path, tmp_path: Path) -> None:
    (photos / "val" / "class0" / "copy.png").write_bytes((photos / "train" / "class0" / "0.png").read_bytes())
    with pytest.raises(InputError, match=r"copy\.png: in val, and as .*0\.png in train"):
        linear.run(model, LinearOptions(data=photos, steps=2), tmp_path)


SCRIPT = """
import sys, torch
from pathlib import Path
from vitreg_core import VisionTransformer, ViTConfig
from vitreg_eval.config import LinearOptions
from vitreg_eval.tasks import linear
torch.set_num_threads(1)
torch.manual_seed(0)
config = ViTConfig(image_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3, registers=1)
model = VisionTransformer(config).eval()
options = LinearOptions(data=Path(sys.argv[1]), protocol="dinov2", steps=5, train_batch=7, cache=Path(sys.argv[3]))
linear.run(model, options, Path(sys.argv[2]))
"""


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_two_processes_train_as_one(model: VisionTransformer, photos: Path, tmp_path: Path) -> None:
    options = LinearOptions(data=photos, protocol="dinov2", steps=5, train_batch=7)
    linear.run(model, options, tmp_path / "one")
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": "1",
    }
    started = []
    for rank in ("0", "1"):
        out = tmp_path / f"two{rank}"
        out.mkdir()
        words = [sys.executable, "-c", SCRIPT, str(photos), str(out), str(tmp_path / "cache")]
        environment = {**common, "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
        started.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, told = process.communicate(timeout=240)
        assert process.returncode == 0, told
    assert not (tmp_path / "two1" / STATE).exists()
    one, two = (load_file(tmp_path / name / STATE) for name in ("one", "two0"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-7)
