"""CLIP's signal: steps as open_clip's, parts of a batch, groups, schedule, resuming, starting from weights."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from vitreg_core import create_model, load_model, save_model
from vitreg_core.clip import DualEncoder, Encoded
from vitreg_core.clip_config import ClipConfig
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_core.weights.clip import load_clip
from vitreg_core.weights.files import write_folder
from vitreg_recipes import find, train
from vitreg_recipes.contrast.config import ContrastConfig, ContrastOptimConfig
from vitreg_recipes.contrast.data import Pairs
from vitreg_recipes.loop import set_up, start
from vitreg_recipes.objectives.contrast import Contrast
from vitreg_recipes.runs import notes
from vitreg_recipes.signals.contrast import ContrastSchedule, make_optimizer
from vitreg_recipes.state import TrainState

SMALL = {
    "model.image_size": 16,
    "model.embed_dim": 64,
    "model.num_heads": 1,
    "model.depth": 1,
    "model.num_classes": 8,
    "text.context_length": 6,
    "text.width": 8,
    "text.layers": 1,
    "data.batch_size": 4,
    "data.workers": 0,
    "optim.warmup_steps": 2,
    "steps": 4,
    "save_every": 2,
    "log_every": 2,
}


def small(**changes: object) -> ContrastConfig:
    """A run of milliseconds; takes overrides with `__` for dots."""
    config = find("openclip_scenes")
    assert isinstance(config, ContrastConfig)
    return override(config, SMALL | {name.replace("__", "."): value for name, value in changes.items()})


def draw(count: int, seed: int = 0) -> Pairs:
    """Noise and random tokens that end as open_clip's do."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 40_000, (count, 6), generator=generator)
    tokens[:, -1] = 49_407
    return Pairs(torch.randn(count, 3, 16, 16, generator=generator), tokens)


def objective_of(state: TrainState) -> Contrast:
    assert isinstance(state.objective, Contrast)
    return state.objective


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("siglip", [False, True])
def test_a_step_is_open_clips(tmp_path: Path, siglip: object) -> None:
    torch.manual_seed(1)
    vision = CLIPVisionCfg(layers=1, width=64, head_width=64, patch_size=8, image_size=16)
    text = CLIPTextCfg(context_length=6, vocab_size=49_408, width=8, heads=2, layers=1)
    scale, bias = (math.log(10), -10.0) if siglip else (math.log(1 / 0.07), None)
    theirs = CLIP(8, vision, text, init_logit_scale=scale, init_logit_bias=bias, output_dict=True)
    config = {
        "model_cfg": {"embed_dim": 8, "vision_cfg": {"width": 64, "head_width": 64}, "text_cfg": {"heads": 2}},
        "preprocess_cfg": {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD},
    }
    write_folder(theirs.state_dict(), config, tmp_path, ("open_clip_model.safetensors", "open_clip_config.json"))
    ours = small(init=str(tmp_path), loss="siglip" if siglip else "clip", optim__clip=None, steps=10)
    state = set_up(ours, start(ours))
    objective, optimizer = objective_of(state), their_optimizer(theirs)
    theirs.double(), objective.model.double()
    loss = open_clip.loss.SigLipLoss() if siglip else open_clip.ClipLoss()
    for step in range(3):
        batch = Pairs(draw(4, step).images.double(), draw(4, step).tokens)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = state.schedule.lr(step)
        optimizer.zero_grad()
        value = loss(**theirs(batch.images, batch.tokens))
        value.backward()
        metrics = objective.step(batch)
        torch.testing.assert_close(metrics["loss"], value.detach(), rtol=0, atol=1e-9)
        torch.testing.assert_close(metrics["logit_scale"], theirs.logit_scale.detach().exp(), rtol=0, atol=1e-9)
        for mine, their in pairs(objective.model, theirs):
            torch.testing.assert_close(mine.grad, their.grad, rtol=0, atol=1e-9)
        optimizer.step()
        state.advance()
        objective.after_step()
        theirs.logit_scale.data.clamp_(0, math.log(100))
        for mine, their in pairs(objective.model, theirs):
            torch.testing.assert_close(mine, their, rtol=0, atol=1e-8)


def pairs(ours: DualEncoder, theirs: CLIP) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters that are the same in both."""
    yield ours.logit_scale, theirs.logit_scale
    yield ours.visual.blocks[0].attn.qkv.weight, theirs.visual.transformer.resblocks[0].attn.in_proj_weight
    yield ours.visual.patch_embed.proj.weight, theirs.visual.conv1.weight
    yield ours.visual.cls, theirs.visual.class_embedding
    yield ours.visual.norm.bias, theirs.visual.ln_post.bias
    yield ours.text.token_embedding.weight, theirs.token_embedding.weight
    yield ours.text.text_projection, theirs.text_projection
    if ours.logit_bias is not None:
        yield ours.logit_bias, theirs.logit_bias


def is_spared(name: str, parameter: Tensor) -> bool:
    """open_clip's rule of what is not decayed."""
    return parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))


def their_optimizer(model: CLIP) -> torch.optim.AdamW:
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if is_spared(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in named if not is_spared(name, p)], "weight_decay": 0.1},
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-6)


def test_what_is_decayed_is_what_open_clip_decays() -> None:
    theirs = CLIP(
        8, CLIPVisionCfg(layers=1, width=64, head_width=64, patch_size=8, image_size=16), CLIPTextCfg(layers=1)
    )
    spared = sum(p.numel() for name, p in theirs.named_parameters() if is_spared(name, p))
    config = small(text__context_length=77, text__width=512, text__heads=8)
    for registers in (0, 3):
        model = objective_of(set_up(override(config, {"model.registers": registers}), start(config))).model
        optimizer = make_optimizer(model, ContrastOptimConfig())
        sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
        assert sizes == [spared + registers * 64, sum(p.numel() for p in theirs.parameters()) - spared]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.2]
        assert optimizer.defaults["betas"] == (0.9, 0.98)
        assert optimizer.defaults["eps"] == 1e-6


@pytest.mark.parametrize(("step", "lr"), [(0, 2.5e-7), (1999, 5e-4), (2000, 5e-4), (6000, 2.5e-4), (9999, 1.93e-11)])
def test_the_learning_rate_is_open_clips(step: int, lr: float) -> None:
    assert ContrastSchedule(ContrastOptimConfig(warmup_steps=2000), 10_000).lr(step) == pytest.approx(lr, rel=1e-3)


@pytest.fixture
def double() -> Iterator[None]:
    """Models and batches in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("loss", "drop_path"), [("clip", 0.0), ("siglip", 0.0), ("clip", 0.5)])
def test_four_parts_give_the_gradient_of_the_whole(loss: str, drop_path: float) -> None:
    config = small(loss=loss, data__batch_size=32, model__drop_path=drop_path, model__depth=2, model__registers=2)
    batch, found = draw(32), []
    for parts in (4, 1):
        state = set_up(override(config, {"accumulate": parts}), start(config))
        objective = objective_of(state)
        if parts == 1:
            draw_in_parts(objective)
        torch.manual_seed(5)
        metrics = objective.step(Pairs(batch.images.double(), batch.tokens))
        found.append((metrics, gradients(objective.model), torch.rand(1)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)  # and parts have drawn no more than the whole
    assert found[0][1]["logit_scale"].abs() > 1e-4


def draw_in_parts(objective: Contrast) -> None:
    """Let the encoder take a batch at once, but draw what drop path does for four parts, one after the other."""
    run = objective.network.forward

    def forward(images: Tensor, tokens: Tensor) -> Encoded:
        parts = [run(*part) for part in zip(images.chunk(4), tokens.chunk(4), strict=True)]
        return Encoded(*(torch.cat(side) for side in zip(*parts, strict=True)))

    objective.network.forward = forward


def test_the_factor_stays_between_1_and_100() -> None:
    config = small()
    objective = objective_of(set_up(config, start(config)))
    for before, after in ((-1.0, 1.0), (9.0, 100.0), (2.0, math.exp(2.0))):
        objective.model.logit_scale.data.fill_(before)
        objective.after_step()
        assert objective.model.logit_scale.exp().item() == pytest.approx(after)


def test_the_gradient_is_clipped_where_that_is_wanted() -> None:
    for limit in (1e-3, None):
        config = small(optim__clip=limit)
        objective = objective_of(set_up(config, start(config)))
        objective.step(draw(4))
        before = gradients(objective.model)
        objective.clip()
        norm = torch.stack([g.norm() for g in gradients(objective.model).values()]).norm()
        assert norm == pytest.approx(limit if limit else torch.stack([g.norm() for g in before.values()]).norm())


class Killed(Exception):  # noqa: N818 (no error)
    """A process that was killed."""


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    config = small(model__registers=2, model__drop_path=0.2, accumulate=2)

    def crash(state: TrainState, _metrics: object) -> None:
        if state.step == 3:
            raise Killed

    straight = train(override(config, {"out": str(tmp_path / "a")}))
    broken = override(config, {"out": str(tmp_path / "b")})
    with pytest.raises(Killed):
        train(broken, hooks=[crash])
    resumed = train(broken, resume=True)
    for (name, one), (_, other) in zip(straight.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    saved = load_clip(tmp_path / "b")
    batch = draw(3)
    for mine, theirs in zip(saved(batch.images, batch.tokens), resumed(batch.images, batch.tokens), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert load_model(tmp_path / "b").num_registers == 2


def test_a_run_starts_from_both_towers_or_from_one(tmp_path: Path) -> None:
    first = train(small(out=str(tmp_path / "first"), steps=2))
    assert isinstance(first, DualEncoder)
    config = small(init=str(tmp_path / "first"), model__registers=2, model__image_size=24)
    with pytest.warns(UserWarning, match="2 registers added with random values"):
        model = objective_of(set_up(config, start(config))).model
    assert torch.equal(model.text.token_embedding.weight, first.text.token_embedding.weight)
    assert torch.equal(model.visual.blocks[0].mlp.fc1.weight, first.visual.blocks[0].mlp.fc1.weight)
    assert torch.equal(model.visual.head.weight, first.visual.head.weight)
    assert torch.equal(model.logit_scale, first.logit_scale)
    assert (model.visual.num_registers, model.config.vision.size) == (2, (24, 24))
    other = override(config, {"loss": "siglip", "model.registers": 0})
    assert objective_of(set_up(other, start(other))).model.logit_scale.exp().item() == pytest.approx(10)


def test_an_image_tower_gets_a_projection_and_a_text_tower(tmp_path: Path) -> None:
    tower = create_model("vit_ti16_reg2", depth=1, embed_dim=8, num_heads=1, image_size=32, mask_token=True)
    save_model(tower, tmp_path / "tower")
    config = small(init=str(tmp_path / "tower"), model__image_size=32, model__registers=2, out=str(tmp_path / "out"))
    model = train(override(config, {"steps": 2}))
    assert isinstance(model, DualEncoder)
    assert model.config.vision.num_classes == 8
    assert model.visual.head.bias is None
    assert not torch.equal(model.visual.blocks[0].mlp.fc1.weight, tower.blocks[0].mlp.fc1.weight)
    assert model.visual.preprocess.config.mean == tower.preprocess.config.mean
    batch = Pairs(torch.randn(2, 3, 32, 32), draw(2).tokens)
    saved = load_clip(tmp_path / "out")
    torch.testing.assert_close(saved.encode_image(batch.images), model.encode_image(batch.images), rtol=0, atol=1e-6)


def test_a_tower_that_open_clip_has_not_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    save_model(create_model("vit_ti16", depth=1, embed_dim=8, num_heads=1, image_size=32), tmp_path / "tower")
    config = small(init=str(tmp_path / "tower"), model__image_size=32, out=str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"pre_norm=False cannot be written for open_clip"):
        set_up(config, start(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_classes": 0}, "model.num_classes=0: it is the width of the space"),
        ({"optim__warmup_steps": 9}, "optim.warmup_steps=9 of steps=4; warm up for fewer steps"),
        ({"optim__betas": (0.9, 1.0)}, "optim.betas=0.9 1.0: give two numbers from 0 to below 1"),
        ({"data__crop_scale": (0.0, 1.0)}, r"data.crop_scale=0.0 1.0: give two shares"),
        ({"model__image_size": (16, 24)}, r"model.image_size=\(16, 24\): crops are square"),
        ({"strategy": "fsdp2"}, "strategy=fsdp2: both towers are copied"),
        ({"data__batch_size": 1}, "data.batch_size=1: .* give 2 or more"),
        ({"text__vocab_size": 100}, "text.vocab_size=100: open_clip's tokenizer has 49408"),
        ({"text__context_length": 2}, "text.context_length=2: .* give 3 or more"),
        ({"text__heads": 3}, "text.width=8 does not divide by text.heads=3"),
        ({"accumulate": 3}, "accumulate=3: the 4 images of a process"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(changes: dict[str, object], message: str) -> None:
    config = small(**changes)
    with pytest.raises(InputError, match=message) as refused:
        set_up(config, start(config))
    assert "\n" not in str(refused.value)


def test_the_paper_s_run_is_open_clips_model() -> None:
    config = find("openclip_b16_reg4")
    assert isinstance(config, ContrastConfig)
    with torch.device("meta"):
        sizes = [
            sum(
                p.numel() for p in DualEncoder(ClipConfig(vision=override(config.model, {"registers": n}))).parameters()
            )
            for n in (0, 4)
        ]
    assert sizes == [149_620_737, 149_620_737 + 4 * 768]
    assert config.model.registers == 4
    assert (config.data.batch_size, config.epochs, config.precision) == (32768, 32, "bf16")
    assert notes("openclip_b16").published.startswith("on licensed data, zero-shot 59.9 %")


@pytest.mark.parametrize("name", ["openclip_b16", "openclip_scenes"])
def test_costs_are_those_of_both_towers(name: str) -> None:
    config = find(name)
    assert isinstance(config, ContrastConfig)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = DualEncoder(ClipConfig(vision=config.model, text=config.text))
        model(torch.zeros(1, 3, *config.model.size), torch.zeros(1, config.text.context_length, dtype=torch.long))
    laion = 407_332_084
    images = config.steps * config.data.batch_size if config.steps else (config.epochs or 0) * laion
    stated = re.match(r"([\d.e]+) images, ([\d.e]+) FLOPs", notes(name).cost)
    assert stated
    assert float(stated[1]) == pytest.approx(images, rel=0.01)
    assert float(stated[2]) == pytest.approx(3 * images * counter.get_total_flops(), rel=0.01)
