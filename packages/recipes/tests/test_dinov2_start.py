"""How a self-supervised run starts: from other weights, with new or kept heads, and with what is said of its batch."""

from pathlib import Path

import pytest
import torch
from vitreg_core import VisionTransformer, save_model
from vitreg_core.config import ViTConfig, override
from vitreg_core.errors import InputError
from vitreg_recipes import find, train
from vitreg_recipes.dinov2.config import DinoConfig
from vitreg_recipes.loop import set_up, start
from vitreg_recipes.objectives.dinov2 import Dinov2
from vitreg_recipes.plan import Hardware, plan, step_flops
from vitreg_recipes.state import TrainState

SHAPES = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 2, "mask_token": True}
SMALL = {f"model.{name}": value for name, value in SHAPES.items()} | {
    "data.batch_size": 4,
    "data.local_size": 16,
    "data.local_crops": 1,
    "head.prototypes": 12,
    "head.hidden": 16,
    "head.bottleneck": 8,
    "optim.warmup_steps": 0,
    "optim.freeze_last_steps": 0,
    "steps": 4,
    "save_every": 4,
}


def small(**changes: object) -> DinoConfig:
    config = override(find("dinov2_scenes"), SMALL | {name.replace("__", "."): v for name, v in changes.items()})
    assert isinstance(config, DinoConfig)
    return config


def step(state: TrainState) -> None:
    objective = state.objective
    assert isinstance(objective, Dinov2)
    objective.step(next(state.data.batches(state.step, state.share, torch.device("cpu"))))
    objective.clip()
    state.advance()
    objective.after_step()


def test_only_new_heads_learn_while_the_backbone_rests(tmp_path: Path) -> None:
    backbone = VisionTransformer(ViTConfig(**SHAPES, layer_scale=0.1, position_offset=0.1, position_antialias=False))
    save_model(backbone, tmp_path / "official")
    state = set_up(config := small(init=str(tmp_path / "official"), optim__freeze_backbone_steps=2), start(config))
    student = state.objective.student
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert torch.equal(before["backbone.blocks.0.attn.qkv.weight"], backbone.blocks[0].attn.qkv.weight)
    for number in range(3):
        step(state)
        rested = torch.equal(student.backbone.blocks[0].attn.qkv.weight, before["backbone.blocks.0.attn.qkv.weight"])
        assert rested is (number < 2)
        assert not torch.equal(student.dino_head.mlp[0].weight, before["dino_head.mlp.0.weight"])
        if rested:
            for name, value in state.objective.teacher.backbone.state_dict().items():
                torch.testing.assert_close(value, before[f"backbone.{name}"])


def test_heads_of_a_run_come_with_its_weights(tmp_path: Path) -> None:
    train(first := small(out=tmp_path / "first"))
    trained = set_up(config := small(init=str(first.out), model__image_size=48), start(config)).objective
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "first" / "heads.safetensors")
    for network in (trained.student, trained.teacher):
        assert torch.equal(network.dino_head.mlp[0].weight, kept["dino_head.mlp.0.weight"])
    assert trained.student.backbone.config.image_size == 48
    with pytest.raises(InputError, match=r"heads.safetensors: tensor dino_head.last_layer.weight_. has shape"):
        set_up(other := small(init=str(first.out), head__prototypes=10), start(other))


def test_weights_without_mask_token_serve_runs_without_masks(tmp_path: Path) -> None:
    save_model(VisionTransformer(ViTConfig(**SHAPES | {"mask_token": False})), tmp_path / "plain")
    with pytest.raises(InputError, match="it has no mask token, which the loss on patches needs"):
        set_up(config := small(init=str(tmp_path / "plain")), start(config))
    state = set_up(config := small(init=str(tmp_path / "plain"), loss__ibot=0.0), start(config))
    step(state)
    assert state.model.mask_token is None


def test_dino_trains_without_masks() -> None:
    state = set_up(config := small(model__mask_token=False, loss__ibot=0.0, loss__koleo=0.0), start(config))
    step(state)
    named = state.objective.step(next(state.data.batches(0, state.share, torch.device("cpu"))))
    assert not {"ibot", "koleo"} & named.keys()


def test_a_head_that_nothing_teaches_is_refused() -> None:
    with pytest.raises(InputError, match=r"ibot_head with loss.ibot=0: it would learn nothing"):
        small(loss__ibot=0.0, ibot_head={"prototypes": 8}).check()


def test_a_small_batch_for_many_prototypes_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(config := small(head__prototypes=65_536), start(config))
    told = capsys.readouterr().err
    assert (
        "data.batch_size=4 with head.prototypes=65536: settings for thousands of images per step hardly learn" in told
    )
    set_up(config := small(), start(config))
    assert "head.prototypes" not in capsys.readouterr().err


def test_work_is_counted_for_all_passes() -> None:
    config = small(loss__ibot=0.0, model__mask_token=False, data__local_crops=3)
    tokens = {32: 17, 16: 5}

    def forward(side: int) -> int:
        count, width, depth = tokens[side], 16, 2
        embed = 2 * (count - 1) * 3 * 64 * width
        return depth * (24 * count * width**2 + 4 * count**2 * width) + embed

    head = 2 * (16 * 16 + 16 * 16 + 16 * 8 + 8 * 12)
    student, teacher = 2 * forward(32) + 3 * forward(16) + 5 * head, 2 * forward(32) + 2 * head
    assert step_flops(config) == 3 * student + teacher
    found = plan(config, Hardware(gpus=1))
    assert (found.flops, found.images) == (step_flops(config), 16)
    assert found.room > 4
