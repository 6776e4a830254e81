import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn import functional as F
from vitreg_core import load_model
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_recipes import train
from vitreg_recipes.build import build
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data import open_data
from vitreg_recipes.loop import batches, set_up, start
from vitreg_recipes.optim import lr_at
from vitreg_recipes.state import TrainState

Tiny = Callable[..., TrainConfig]


def test_one_seed_gives_one_model_and_another_seed_another(tiny: Tiny) -> None:
    starts = [set_up(tiny(seed=seed), start(tiny())).model.head.weight.clone() for seed in (0, 0, 1)]
    ends = [train(tiny(steps=3, seed=seed)).head.weight for seed in (0, 0, 1)]
    for first, again, other in (starts, ends):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_the_folder_of_a_run_is_a_model_with_its_preprocessing(tiny: Tiny, tmp_path: Path) -> None:
    model = train(tiny(out=tmp_path, steps=2))
    loaded = load_model(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    assert not model.training
    torch.testing.assert_close(loaded.classify(images), model.classify(images), rtol=0, atol=0)
    assert loaded.preprocess.config == model.preprocess.config
    assert (loaded.preprocess.config.mean, loaded.preprocess.config.crop_ratio) == ((0.5, 0.5, 0.5), 1.0)


def test_the_log_tells_loss_rate_and_speed(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(out=tmp_path, steps=5)
    losses: list[float] = []
    train(config, hooks=[lambda state, metrics: losses.append(metrics["loss"].item())])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert [line["loss"] for line in lines] == pytest.approx(
        [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]], rel=1e-6
    )
    assert [line["lr"] for line in lines] == [lr_at(step - 1, config.optim, 5, 1000) for step in (2, 4, 5)]
    assert abs(losses[0] - math.log(2)) < 0.05
    assert all(line["images_per_second"] > 0 and line["skipped_images"] == 0 for line in lines)
    assert all(0 <= line["data_wait"] <= 1 for line in lines)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_it_loadable(tiny: Tiny, tmp_path: Path) -> None:
    def spoil(state: TrainState, metrics: Mapping[str, Tensor]) -> None:
        if state.step == 4:
            metrics["loss"].fill_(torch.nan)

    with pytest.raises(
        InputError, match=r"step 4: loss is nan; lower optim.lr=.*warmup_steps=2, or use precision=fp32"
    ):
        train(tiny(out=tmp_path, log_every=3, save_every=2), hooks=[spoil])
    assert load_model(tmp_path / "checkpoints" / "step_000004").cls.isfinite().all()


def test_registers_move_apart_from_each_other(tiny: Tiny) -> None:
    config = tiny(steps=3)
    trained = train(config).registers.tokens
    torch.manual_seed(config.seed)
    assert not torch.equal(trained, build(config, open_data(config)).registers.tokens)
    assert (trained[0] - trained[1]).norm() > 1e-3


def test_bf16_is_close_to_fp32_and_keeps_fp32_weights(tiny: Tiny) -> None:
    exact = train(tiny(steps=2))
    AcceleratorState._reset_state()
    rounded = train(tiny(steps=2, precision="bf16"))
    assert rounded.head.weight.dtype == torch.float32
    assert not torch.equal(rounded.head.weight, exact.head.weight)
    torch.testing.assert_close(rounded.head.weight, exact.head.weight, rtol=0.1, atol=1e-2)


def test_one_process_trains_in_one_precision(tiny: Tiny) -> None:
    train(tiny(steps=2))
    with pytest.raises(InputError, match=r"precision=bf16: .*; train it in a process of its own"):
        train(tiny(steps=2, precision="bf16"))


def test_processes_that_do_not_know_of_each_other_are_an_error(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"WORLD_SIZE=2, but .* 1 process\(es\); .*ACCELERATE_USE_CPU=true torchrun"):
        train(tiny())


def test_a_config_that_does_not_fit_writes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_heads=3 does not divide embed_dim=8"):
        train(tiny(out=tmp_path / "run", model__num_heads=3))
    assert not list(tmp_path.iterdir())


def test_a_batch_in_parts_has_the_gradient_of_the_whole(tiny: Tiny) -> None:
    config = tiny(mix__mixup=0, mix__cutmix=0, data__batch_size=8, model__layer_scale=1.0, model__drop_path=0)
    found = []
    for parts in (1, 4):
        state = set_up(override(config, {"accumulate": parts}), start(override(config, {"accumulate": parts})))
        loss = state.objective.step(next(batches(state)))["loss"]
        found.append([loss, *(parameter.grad for parameter in state.model.parameters())])
    for whole, joined in zip(*found, strict=True):
        torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-7)
    assert max(gradient.abs().max() for gradient in found[0]) > 1e-2


@pytest.mark.parametrize(("mixing", "parts"), [(0, 3), (0.8, 3), (0.8, 4)])
def test_a_batch_that_does_not_split_is_an_error(tiny: Tiny, mixing: float, parts: int) -> None:
    with pytest.raises(InputError, match=rf"accumulate={parts}: the 4 images .* do not split into equal parts.*change"):
        train(tiny(accumulate=parts, mix__mixup=mixing, mix__cutmix=0))


def test_a_new_model_starts_from_other_weights(tiny: Tiny, tmp_path: Path, photos: Path) -> None:
    train(tiny(out=tmp_path / "first", steps=2))
    source = load_model(tmp_path / "first")
    config = tiny(
        init=str(tmp_path / "first"),
        data__path=str(photos),
        model__image_size=32,
        model__embed_dim=64,
        out=tmp_path / "b",
    )
    state = set_up(config, start(config))
    model = state.model
    assert (model.config.embed_dim, model.config.size, model.config.registers) == (8, (32, 32), 2)
    assert (model.config.drop_path, model.config.num_classes) == (0.3, 2)
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    expected = F.interpolate(
        source.positions.patches.T.unflatten(1, (2, 2))[None], (4, 4), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(model.positions.patches, expected[0].flatten(1).T)
    assert model.preprocess.config.mean == state.data.preprocess.mean == (0.5, 0.5, 0.5)  # as the source expects
    assert (state.config.model.embed_dim, state.config.model.num_classes) == (8, 0)
    trained = train(config)
    resumed = train(config, resume=True)
    assert torch.equal(trained.head.weight, resumed.head.weight)


def test_a_head_for_as_many_classes_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(out=tmp_path, steps=2))
    source = load_model(tmp_path)
    kept = set_up(config := tiny(init=str(tmp_path)), start(config)).model
    new = set_up(config := tiny(init=str(tmp_path), data__label="relation"), start(config)).model
    assert torch.equal(kept.head.weight, source.head.weight)
    assert new.head.weight.shape == (48, 8)


def test_registers_that_the_weights_lack_start_at_random_with_a_warning(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(out=tmp_path, steps=2))
    with pytest.warns(UserWarning, match="2 registers added with random values"):
        model = set_up(config := tiny(init=str(tmp_path), model__registers=4), start(config)).model
    tokens = load_model(tmp_path).registers.tokens
    assert torch.equal(model.registers.tokens[:2], tokens)
    assert model.registers.tokens[2:].std() > 0
    with pytest.raises(InputError, match=r"model.registers=1 with init=.* rely on its 2; leave model.registers out"):
        set_up(config := tiny(init=str(tmp_path), model__registers=1), start(config))
    fewer = set_up(config := tiny(init=str(tmp_path), model__registers=0), start(config)).model
    assert torch.equal(fewer.registers.tokens, tokens)


def test_images_smaller_than_a_patch_of_the_weights_are_an_error(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(out=tmp_path, steps=2))
    with pytest.raises(InputError, match="image_size=4 is smaller than patch_size=8; give a larger image_size"):
        train(tiny(init=str(tmp_path), model__image_size=4))
    with pytest.raises(InputError, match="no such file or folder"):
        train(tiny(init="nowhere"))
