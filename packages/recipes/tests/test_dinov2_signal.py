"""DINOv2's signal: networks, groups and steps, alone and on two processes. As a script, one of two processes."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vitreg_core import load_model
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_recipes import find, train
from vitreg_recipes.checkpoints import checkpoints
from vitreg_recipes.dinov2.config import DinoConfig
from vitreg_recipes.dinov2.crops import Crops
from vitreg_recipes.dinov2.losses import cross_entropy, koleo_loss, masked_weights
from vitreg_recipes.dinov2.networks import Network
from vitreg_recipes.dinov2.targets import Center
from vitreg_recipes.loop import set_up, start
from vitreg_recipes.objectives.dinov2 import Dinov2, effective_rank
from vitreg_recipes.signals.dinov2 import build_networks, keyed, make_optimizer
from vitreg_recipes.state import TrainState

SMALL = {
    "model.image_size": 32,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.depth": 2,
    "model.registers": 2,
    "data.batch_size": 4,
    "data.local_size": 16,
    "data.local_crops": 2,
    "data.workers": 0,
    "head.prototypes": 12,
    "head.hidden": 16,
    "head.bottleneck": 8,
    "optim.warmup_steps": 2,
    "optim.freeze_last_steps": 1,
    "loss.centering": "center",
    "teacher.temperature": (0.04, 0.07),
    "teacher.momentum": 0.9,
    "teacher.temperature_steps": 4,
    "steps": 6,
    "save_every": 2,
    "log_every": 2,
}


def small(**changes: object) -> DinoConfig:
    """A run of milliseconds; takes overrides with `__` for dots."""
    config = find("dinov2_scenes")
    assert isinstance(config, DinoConfig)
    return override(config, SMALL | {name.replace("__", "."): value for name, value in changes.items()})


def draw(images: int = 4, seed: int = 0) -> Crops:
    """Crops of noise, with as many masked patches in every image."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(2 * images, 16, dtype=torch.bool)
    masks[:images, : 5 + seed] = True
    pixels = (
        torch.randn(2 * images, 3, 32, 32, generator=generator),
        torch.randn(2 * images, 3, 16, 16, generator=generator),
    )
    return Crops(*(part.to(torch.get_default_dtype()) for part in pixels), masks)


def objective_of(state: TrainState) -> Dinov2:
    assert isinstance(state.objective, Dinov2)
    return state.objective


def steps_of(config: DinoConfig, share: Callable[[Crops], Crops]) -> dict[str, list]:
    """Metrics and gradients of two steps on given batches."""
    torch.set_default_dtype(torch.float64)
    try:
        state = set_up(config, start(config))
        objective, found = objective_of(state), {"metrics": [], "gradients": [], "centers": []}
        for number in range(2):
            metrics = objective.step(share(draw(seed=number)))
            found["metrics"].append({name: state.accelerator.reduce(v.clone(), "mean") for name, v in metrics.items()})
            found["gradients"].append([p.grad.clone() for p in objective.student.parameters() if p.grad is not None])
            found["centers"].append([value.clone() for value in objective.cls_targets.state_dict().values()])
            objective.clip()
            state.advance()
            objective.after_step()
    finally:
        torch.set_default_dtype(torch.float32)
    return found


HEAD = {"prototypes": 10, "hidden": 8, "bottleneck": 4, "layers": 2}
RUNS = {
    "center": {"loss__koleo": 0.0},
    "sinkhorn": {"loss__koleo": 0.0, "loss__centering": "sinkhorn", "ibot_head": HEAD},
    "koleo": {"loss__ibot": 0.0},
}


def main(folder: Path) -> None:
    """What each of two processes does."""
    rank = int(os.environ["RANK"])
    for name, values in json.loads((folder / "runs.json").read_text()).items():
        torch.save(steps_of(DinoConfig(**values), lambda crops: crops.split(2)[rank]), folder / f"{name}_{rank}.pt")


def test_two_processes_learn_as_one_on_the_joined_batch(tmp_path: Path) -> None:
    configs = {name: small(**changes) for name, changes in RUNS.items()}
    values = {name: config.model_dump(mode="json") for name, config in configs.items()}
    (tmp_path / "runs.json").write_text(json.dumps(values))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, config in configs.items():
        whole = steps_of(config, lambda crops: crops)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True)
            for number in range(2 if name != "koleo" else 1):
                expected = dict(whole["metrics"][number])
                ours = found["metrics"][number]
                if name == "koleo":
                    expected["koleo"] = koleo_by_halves(config)
                    expected["loss"] = expected["dino_local"] + expected["dino_global"] + expected["koleo"]
                for metric in expected.keys() - {"feature_rank"}:
                    torch.testing.assert_close(
                        ours[metric], expected[metric], rtol=0, atol=1e-10, msg=f"{name} {metric}"
                    )
                if name != "koleo":
                    torch.testing.assert_close(found["centers"][number], whole["centers"][number], rtol=0, atol=1e-7)
                    pairs = zip(found["gradients"][number], whole["gradients"][number], strict=True)
                    for mine, theirs in pairs:
                        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def koleo_by_halves(config: DinoConfig) -> Tensor:
    """KoLeo as it is defined: each process compares its own images."""
    torch.set_default_dtype(torch.float64)
    try:
        objective = objective_of(set_up(config, start(config)))
        objective.network.train()
        cls = objective.student(draw(), masked_weights(draw().masks)[0]).cls
        halves = [koleo_loss(crop[part]) for crop in cls for part in (slice(0, 2), slice(2, 4))]
    finally:
        torch.set_default_dtype(torch.float32)
    return config.loss.koleo * torch.stack(halves).sum().double() / 2


def test_a_step_is_the_losses_of_separate_passes() -> None:
    config = small()
    objective, batch = objective_of(set_up(config, start(config))), draw()
    masked, weights = masked_weights(batch.masks)
    student, teacher = objective.student.eval(), objective.teacher
    large = [
        student.backbone(half, mask)
        for half, mask in zip(batch.global_crops.chunk(2), batch.masks.chunk(2), strict=True)
    ]
    local = [student.backbone(crop) for crop in batch.local_crops.chunk(2)]
    seen = [teacher.backbone(half) for half in batch.global_crops.chunk(2)]
    center = Center(12)
    targets = center(teacher.dino_head(torch.cat([part.cls for part in seen])), 0.04).chunk(2)
    crossed = sum(cross_entropy(student.dino_head(large[a].cls), targets[b]).mean() for a, b in ((0, 1), (1, 0))) / 6
    spread = sum(cross_entropy(student.dino_head(part.cls), target).mean() for part in local for target in targets) / 6
    patches = torch.cat([part.patches for part in large]).flatten(0, 1)[masked]
    hidden = Center(12)(teacher.dino_head(torch.cat([part.patches for part in seen]).flatten(0, 1)[masked]), 0.04)
    ibot = (cross_entropy(student.dino_head(patches), hidden) * weights).sum() / 8
    koleo = 0.1 * sum(koleo_loss(part.cls) for part in large)
    found = objective.step(batch)
    expected = {"dino_global": crossed, "dino_local": spread, "ibot": ibot, "koleo": koleo}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(found["loss"], torch.stack(list(expected.values())).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", ["s", "b", "l"])
def test_groups_have_the_official_factors(size: str) -> None:
    shapes = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}[size]
    changes = dict(zip(("model__embed_dim", "model__depth", "model__num_heads"), shapes, strict=True))
    config = small(**changes, model__patch_size=16, model__registers=4, optim__layer_decay=0.9, data__local_size=32)
    with torch.device("meta"):
        from vitreg_core import VisionTransformer
        from vitreg_recipes.dinov2.networks import Student

        student = Student(VisionTransformer(config.model), config)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    factors = {names[id(parameter)]: key for parameter, key in keyed(student, config)}
    depth = shapes[1]
    first, patch = (0.254187, 0.050837) if depth == 12 else (0.9**25, 0.2 * 0.9**25)
    expected = {
        "backbone.positions.patches": (first, True),
        "backbone.cls": (first, True),
        "backbone.mask_token": (first, True),
        "backbone.registers.tokens": (first, True),
        "backbone.patch_embed.proj.weight": (patch, True),
        "backbone.patch_embed.proj.bias": (patch, False),
        "backbone.blocks.0.attn.qkv.weight": (0.9**depth, True),
        "backbone.blocks.0.attn.qkv.bias": (0.9**depth, False),
        "backbone.blocks.0.norm1.weight": (0.9**depth, False),
        "backbone.blocks.0.ls1.gamma": (0.9**depth, False),
        f"backbone.blocks.{depth - 1}.mlp.fc1.weight": (0.9, True),
        "backbone.norm.weight": (1.0, False),
        "dino_head.mlp.0.weight": (1.0, True),
        "dino_head.mlp.0.bias": (1.0, False),
        "dino_head.last_layer.weight_g": (1.0, True),
        "dino_head.last_layer.weight_v": (1.0, True),
    }
    for name, (scale, decayed) in expected.items():
        assert factors[name][0] == pytest.approx(scale, rel=2e-5), name
        assert factors[name][1] is decayed, name
        assert factors[name][2] is ("last_layer" in name), name
    assert factors.keys() == {name for name, parameter in student.named_parameters() if parameter.numel()}


def test_the_prototypes_rest_and_the_networks_are_clipped_alone() -> None:
    config = small(optim__clip=1e-3, steps=10)
    state = set_up(config, start(config))
    objective = objective_of(state)
    before = objective.student.dino_head.last_layer.weight_v.detach().clone()
    objective.step(draw())
    objective.clip()
    for part in objective.student.children():
        norm = torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    state.advance()
    assert torch.equal(objective.student.dino_head.last_layer.weight_v, before)
    objective.step(draw())
    state.advance()
    assert not torch.equal(objective.student.dino_head.last_layer.weight_v, before)


def test_the_teacher_follows_the_student_and_learns_nothing() -> None:
    config = small()
    state = set_up(config, start(config))
    objective = objective_of(state)
    start_at = {name: value.clone() for name, value in objective.teacher.state_dict().items()}
    objective.step(draw())
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.add_(1.0)
    objective.after_step()
    for name, value in objective.teacher.state_dict().items():
        torch.testing.assert_close(value, start_at[name] + 0.1, rtol=1e-5, atol=1e-6)
    assert not objective.teacher.training


def test_the_losses_are_those_of_lightly() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 12), torch.randn(4, 3, 12)
    from vitreg_recipes.dinov2.losses import dino_loss, ibot_loss

    theirs = DINOLoss(output_dim=12, warmup_teacher_temp=0.05, teacher_temp=0.05, warmup_teacher_temp_epochs=0)
    targets = Center(12)(teacher.flatten(0, 1), 0.05).unflatten(0, (2, 3))
    local, crossed = dino_loss(targets, student[:2], student[2:])
    expected = theirs(list(teacher), list(student), epoch=1)
    torch.testing.assert_close(local + crossed, expected)
    masks = torch.zeros(6, 4, 4, dtype=torch.bool)
    masks[0, 0, :2] = masks[3, 1] = masks[5, 2, 2] = True
    patches, guesses = torch.randn(7, 12), torch.randn(7, 12)
    patch_loss = IBOTPatchLoss(output_dim=12, teacher_temp=0.05, student_temp=0.1)
    _, weights = masked_weights(masks.flatten(1))
    ours = ibot_loss(Center(12)(patches, 0.05), guesses, weights, crops=6)
    torch.testing.assert_close(ours, patch_loss(teacher_out=patches, student_out=guesses, mask=masks))
    rows = torch.randn(5, 8)
    torch.testing.assert_close(koleo_loss(rows), KoLeoLoss()(rows), rtol=1e-5, atol=1e-6)


class CrashError(Exception):
    """What stops a run in these tests."""


@pytest.mark.parametrize("changes", [{}, {"loss__centering": "sinkhorn", "loss__gram": 0.5}, {"accumulate": 2}])
def test_a_crashed_run_resumes_to_the_same_weights(tmp_path: Path, changes: dict[str, object]) -> None:
    whole = train(small(out=tmp_path / "whole", **changes))

    def crash(state: TrainState, metrics: Mapping[str, Tensor]) -> None:
        if state.step == 5:
            raise CrashError

    config = small(out=tmp_path / "again", **changes)
    with pytest.raises(CrashError):
        train(config, hooks=[crash])
    torch.manual_seed(99)
    resumed = train(config, resume=True)
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    runs = [tmp_path / name for name in ("whole", "again")]
    states = [torch.load(checkpoints(run / "checkpoints")[0] / "state.pt", weights_only=True) for run in runs]
    assert str(states[0]["objective"]) == str(states[1]["objective"])
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in runs]
    assert [line["step"] for line in logs[1]] == [2, 4, 6]
    assert all(logs[0][-1][name] == logs[1][-1][name] for name in ("dino_local", "ibot", "feature_rank"))
    assert load_model(tmp_path / "again").config.registers == 2


def test_a_trained_model_can_be_distilled(tmp_path: Path) -> None:
    train(small(out=tmp_path / "large", model__embed_dim=24, model__num_heads=3))
    config = small(out=tmp_path / "small", teacher__source=str(tmp_path / "large"), model__drop_path=0.0)
    state = set_up(config, start(config))
    objective = objective_of(state)
    assert (objective.teacher.backbone.embed_dim, objective.average.backbone.embed_dim) == (24, 16)
    batch = next(state.data.batches(0, state.share, torch.device("cpu")))
    assert batch.masks.all()
    frozen = {name: value.clone() for name, value in objective.teacher.state_dict().items()}
    judged = objective.student.eval()(batch, masked_weights(batch.masks)[0])
    torch.testing.assert_close(judged.patches, objective.student.backbone(batch.global_crops).patches)
    train(config)
    assert all(torch.equal(value, frozen[name]) for name, value in objective.teacher.state_dict().items())
    assert load_model(tmp_path / "small").embed_dim == 16
    with pytest.raises(InputError, match=r"no heads.safetensors there; give the folder of a DINOv2 run"):
        set_up(lost := small(teacher__source="vit_ti16"), start(lost))


def test_gram_anchoring_holds_patches_to_the_start() -> None:
    config = small(loss__gram=1.0, model__drop_path=0.0, loss__ibot=0.0)
    objective = objective_of(set_up(config, start(config)))
    batch = Crops(draw().global_crops, draw().local_crops, torch.zeros(8, 16, dtype=torch.bool))
    assert objective.step(batch)["gram"].item() == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        objective.student.backbone.blocks[1].mlp.fc2.weight.add_(torch.randn(16, 64))
    assert objective.step(batch)["gram"].item() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__batch_size": 1}, "leaves 1 image at a time, and KoLeo compares images; give a larger batch"),
        ({"accumulate": 4}, "accumulate=4 leaves 1 image at a time"),
        ({"data__local_size": 20}, "data.local_size=20 is no multiple of model.patch_size=8"),
        ({"loss__dino": 0.0, "loss__ibot": 0.0}, "there is nothing to learn from"),
        ({"optim__warmup_steps": 7}, "optim.warmup_steps=7 of steps=6; warm up for fewer"),
        ({"model__mask_token": False}, "model.mask_token=False: the losses need both"),
        ({"strategy": "fsdp2"}, "strategy=fsdp2: student and teacher are copied to every process; use ddp"),
        ({"data__global_scale": (0.5, 0.2)}, "data.global_scale=0.5 0.2: give two shares of the area"),
        ({"loss__mask_ratios": (0.5, 1.0)}, "loss.mask_ratios=0.5 1.0: give two shares"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        set_up(config := small(**changes), start(config))


def test_a_loss_that_is_not_finite_names_its_term_and_step(tmp_path: Path) -> None:
    def spoil(state: TrainState, metrics: Mapping[str, Tensor]) -> None:
        if state.step == 4:
            with torch.no_grad():
                objective_of(state).student.backbone.mask_token.fill_(torch.inf)

    with pytest.raises(InputError, match=r"step 5: ibot is nan; lower optim.lr=") as raised:
        train(small(out=tmp_path, log_every=1, save_every=4, loss__koleo=0.0, loss__dino=0.0), hooks=[spoil])
    assert "\n" not in str(raised.value)
    assert all(
        value.isfinite().all() for value in load_model(checkpoints(tmp_path / "checkpoints")[0]).state_dict().values()
    )


def test_the_rank_of_features_counts_directions() -> None:
    torch.manual_seed(0)
    line = torch.randn(20, 1) @ torch.randn(1, 6)
    assert effective_rank(line).item() == pytest.approx(1.0, rel=1e-4)
    corners = torch.cat([torch.eye(4), -torch.eye(4)])
    assert effective_rank(corners).item() == pytest.approx(4.0, rel=1e-5)


def test_networks_share_a_head_unless_told() -> None:
    config = small(ibot_head={"prototypes": 5, "hidden": 8, "bottleneck": 4, "layers": 1})
    backbone = set_up(small(), start(small())).model
    shared, own = (build_networks(c, backbone, torch.device("cpu")).student for c in (small(), config))
    tokens = torch.randn(3, 16)
    assert torch.equal(shared.patch_head(tokens), shared.dino_head(tokens))
    assert own.patch_head(tokens).shape == (3, 5)
    assert isinstance(own, Network)
    assert len(make_optimizer(own, config).param_groups) >= 3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
