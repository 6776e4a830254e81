import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from vitreg_core import create_model, load_model, save_model
from vitreg_core.config import override
from vitreg_core.denoise import averaged_features, draw_views
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer
from vitreg_recipes import find, train
from vitreg_recipes.checkpoints import checkpoints
from vitreg_recipes.distill.config import DistillConfig
from vitreg_recipes.distill.data import Pixels
from vitreg_recipes.distill.seeds import seed_registers
from vitreg_recipes.loop import set_up, start
from vitreg_recipes.objectives.distill import Distill, distance
from vitreg_recipes.signals.distill import DistillSchedule, build, learned
from vitreg_recipes.state import TrainState

Small = Callable[..., DistillConfig]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A trained model's folder: 3 blocks, 5 classes, 1 register, its own normalisation and crop."""
    torch.manual_seed(1)
    model = create_model(
        "vit_ti16_reg1",
        image_size=24,
        patch_size=8,
        embed_dim=8,
        num_heads=2,
        depth=3,
        num_classes=5,
        class_position=True,
    )
    torch.nn.init.normal_(model.positions.patches, std=0.5)
    model.preprocess.config = override(
        model.preprocess.config, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_ratio": 0.9}
    )
    save_model(model, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures without labels, and a damaged one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for index in range(6):
        pixels = numbers.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "6.png").write_bytes(b"")
    return folder


@pytest.fixture
def small(source: Path) -> Small:
    """A run of milliseconds; takes overrides with `__` for dots."""
    values = {
        "init": str(source),
        "model.image_size": 24,
        "model.registers": 3,
        "data.path": "scenes",
        "data.batch_size": 4,
        "data.workers": 0,
        "teacher.shifts": 3,
        "optim.lr": 1e-2,
        "optim.min_lr": 1e-5,
        "optim.warmup_steps": 1,
        "last_blocks": 1,
        "steps": 6,
        "save_every": 2,
        "log_every": 2,
    }

    def build(**changes: object) -> DistillConfig:
        config = find("distill_registers")
        assert isinstance(config, DistillConfig)
        return override(config, values | {name.replace("__", "."): value for name, value in changes.items()})

    return build


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("last_blocks", [0, 1, 2])
def test_only_registers_positions_patch_embedding_and_the_last_blocks_move(small: Small, last_blocks: int) -> None:
    config = small(last_blocks=last_blocks)
    _, student = build(config)
    torch.manual_seed(config.seed)
    state = set_up(config, start(config))
    before = tensors(state.model)
    for batch, _ in zip(state.data.batches(0, state.share, state.accelerator.device), range(3), strict=False):
        state.objective.step(batch)
        state.advance()
        state.objective.after_step()
    blocks = [name for name in before if name.startswith(("blocks.2.", "blocks.1.", "blocks.0.")[:last_blocks])]
    first = {
        "registers.tokens",
        "positions.patches",
        "positions.cls",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    assert moved(before, tensors(state.model)) == {*first, *blocks}
    held = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    named = {name for name, parameter in state.model.named_parameters() if any(parameter is one for one in held)}
    assert named == {*first, *blocks}
    assert {name for name, parameter in student.named_parameters() if parameter.requires_grad} == named


def test_new_registers_stand_behind_the_old_ones_and_differ(small: Small, source: Path) -> None:
    torch.manual_seed(0)
    teacher, student = build(small(model__registers=400))
    ours, theirs = tensors(student), load_model(source).state_dict()
    assert student.num_registers == 400
    torch.testing.assert_close(ours["registers.tokens"][:1], theirs["registers.tokens"], rtol=0, atol=0)
    assert ours["registers.tokens"][1:].std() == pytest.approx(0.02, rel=0.05)
    assert moved(theirs, {name: tensor for name, tensor in ours.items() if name != "registers.tokens"}) == set()
    assert student.config.num_classes == 5
    assert student.preprocess.config == load_model(source).preprocess.config
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    tokens = train(small()).registers.tokens.detach()
    apart = torch.cdist(tokens, tokens) + torch.eye(3)
    assert apart.min() > 1e-3


def test_the_loss_is_that_of_the_shift_averaged_teacher(small: Small, source: Path) -> None:
    config = small(loss__patches=2.0, loss__cls=0.5, teacher__shifts=4)
    state = set_up(config, start(config))
    images = torch.randn(4, 3, 24, 24)
    found = state.objective.step(Pixels(images))
    teacher = load_model(source)
    views = draw_views((3, 3), 4, seed=(0, 0))  # of the first step of seed 0; from four views on all patches are seen
    with torch.no_grad():
        ours = state.model(images)
        patches, cls = averaged_features(teacher, images, views)[0], teacher(images).cls
    terms = []
    for mine, theirs, weight in ((ours.patches, patches, 2.0), (ours.cls, cls, 0.5)):
        dots = (mine * theirs).sum(-1) / (mine.norm(dim=-1) * theirs.norm(dim=-1))
        terms.append(weight * ((1 - dots).mean() + ((mine - theirs) ** 2).mean()))
    torch.testing.assert_close(found["patches"], terms[0])
    torch.testing.assert_close(found["cls"], terms[1])
    torch.testing.assert_close(found["loss"], terms[0] + terms[1])
    assert 0 < found["cosine"] < 1


def test_patches_that_no_view_saw_and_a_class_token_without_weight_do_not_count(small: Small) -> None:
    config = small(loss__cls=0.0, teacher__shifts=1)
    state = set_up(config, start(config))
    images = torch.randn(2, 3, 24, 24)
    objective = state.objective
    assert isinstance(objective, Distill)
    _, wanted, seen = objective.targets(images)
    assert 0 < seen.sum() < 9
    found = objective.step(Pixels(images))
    with torch.no_grad():
        expected = distance(state.model(images).patches[:, seen], wanted[:, seen])
    torch.testing.assert_close(found["loss"], expected)
    assert set(found) == {"patches", "loss", "cosine"}


def test_shifts_are_new_in_every_step_and_fixed_by_the_seed(small: Small) -> None:
    images = torch.randn(1, 3, 24, 24)

    def targets(seed: int, done: int) -> Tensor:
        config = small(seed=seed)
        objective = set_up(config, start(config)).objective
        objective.load_state_dict({"done": done})
        return objective.targets(images)[1]

    assert torch.equal(targets(0, 3), targets(0, 3))
    assert len({tuple(targets(*pair).flatten().tolist()) for pair in ((0, 3), (0, 4), (1, 3), (0, 0))}) == 4


def test_the_loss_falls(small: Small) -> None:
    lines: list[float] = []
    train(small(steps=30, optim__weights_lr=0.1), hooks=[lambda _, metrics: lines.append(float(metrics["loss"]))])
    assert np.mean(lines[-5:]) < 0.9 * np.mean(lines[:5])


def cornered(source: Path, *, places: tuple[int, ...] = (0, 8)) -> VisionTransformer:
    """The model with a position at some places that its last block answers to with an outlier."""
    model = load_model(source)
    assert model.positions is not None
    with torch.no_grad():
        model.positions.patches[list(places)] = 20 * torch.eye(8)[0]
        mlp = model.block(2).mlp
        mlp.fc1.weight[0], mlp.fc1.bias[0] = 3 * torch.eye(8)[0], torch.tensor(-6.0)
        mlp.fc2.weight[:, 0] = 50 * torch.eye(8)[1]
    return model


def test_registers_start_as_the_patches_that_hold_the_outliers(small: Small, source: Path, tmp_path: Path) -> None:
    model = cornered(source)
    images = torch.randn(64, 3, 24, 24)
    norms = model.intermediate(images, [-1], norm=False)[0].patches.norm(dim=-1)
    assert norms[:, [0, 8]].min() > 3 * norms[:, 1:8].max()
    save_model(model, tmp_path / "cornered")
    student = build(small(init=str(tmp_path / "cornered"), model__registers=5)).student.eval()
    before = tensors(student)
    assert seed_registers(student, images, 1)
    after = tensors(student)
    assert moved(before, after) == {"registers.tokens", "positions.patches"}
    reads = model.embeddings(images).mean(dim=0) + model.positions.patches.detach()
    change = after["registers.tokens"] - before["registers.tokens"]
    assert change[[0, 3, 4]].abs().max() == 0
    for place in (0, 8):  # in either order: both hold an outlier in every image
        assert min((row - reads[place]).abs().max() for row in change[1:3]) < 1e-4
    positions = before["positions.patches"].reshape(3, 3, 8)
    expected = positions.clone()
    expected[0, 0] = (positions[0, 1] + positions[1, 0] + positions[1, 1]) / 3
    expected[2, 2] = (positions[2, 1] + positions[1, 2] + positions[1, 1]) / 3
    torch.testing.assert_close(after["positions.patches"], expected.reshape(9, 8))
    found = student.intermediate(images, [-1], norm=False)[0]
    assert found.patches.norm(dim=-1).max() < norms[:, 1:8].max() * 1.5
    assert found.registers.norm(dim=-1)[:, 1:3].min() > 3 * found.patches.norm(dim=-1).max()


def test_outliers_of_no_fixed_place_start_one_register(small: Small, source: Path) -> None:
    model = cornered(source, places=())
    assert model.positions is not None
    torch.nn.init.zeros_(model.positions.patches)
    images = torch.randn(64, 3, 24, 24) * 0.1
    rows = torch.arange(64) % 9
    kernel = model.patch_embed.proj.weight[0].sign() * 9
    for index, place in enumerate(rows.tolist()):  # one patch of each image looks like what the block answers to
        top, left = 8 * (place // 3), 8 * (place % 3)
        images[index, :, top : top + 8, left : left + 8] += kernel
    before = tensors(model)
    assert seed_registers(model, images, 0)
    reads = model.embeddings(images)[torch.arange(64), rows].mean(dim=0)
    assert moved(before, tensors(model)) == {"registers.tokens"}
    torch.testing.assert_close(model.registers.tokens[0] - before["registers.tokens"][0], reads, atol=1e-4, rtol=1e-4)


def test_without_outliers_registers_start_at_random_and_that_is_said(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small()
    state = set_up(config, start(config))
    assert "no outliers among the patches of 64 images: new registers start at random" in capsys.readouterr().err
    torch.manual_seed(config.seed)
    again = set_up(small(start="random"), start(config))
    assert "outliers" not in capsys.readouterr().err
    assert moved(tensors(state.model), tensors(again.model)) == set()


def test_a_run_starts_its_registers_from_outliers(small: Small, source: Path, tmp_path: Path) -> None:
    save_model(cornered(source), tmp_path / "cornered")
    config = small(init=str(tmp_path / "cornered"))
    tokens = {
        kind: set_up(c, start(c)).model.registers.tokens.detach()
        for kind in ("outliers", "random")
        for c in [override(config, {"start": kind})]
    }
    assert tokens["outliers"][1:].norm(dim=-1).min() > 10
    assert tokens["random"][1:].norm(dim=-1).max() < 1
    whole = train(override(config, {"steps": 3}))
    crash(override(config, {"steps": 3, "out": tmp_path / "run"}), 3)
    assert (
        moved(tensors(whole), tensors(train(override(config, {"steps": 3, "out": tmp_path / "run"}), resume=True)))
        == set()
    )


def test_every_step_counts_for_the_shifts(small: Small) -> None:
    counts: list[int] = []
    train(small(steps=3), hooks=[lambda state, _: counts.append(state.objective.state_dict()["done"])])
    assert counts == [1, 2, 3]


class CrashError(Exception):
    """What stops a run in these tests."""


def crash(config: DistillConfig, step: int) -> None:
    def hook(state: TrainState, metrics: Mapping[str, Tensor]) -> None:
        if state.step == step:
            raise CrashError

    with pytest.raises(CrashError):
        train(config, hooks=[hook])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_crashed_run_resumes_to_the_same_weights(
    small: Small, tmp_path: Path, pictures: Path, accumulate: int
) -> None:
    changes = {"data__path": str(pictures), "accumulate": accumulate, "steps": 5, "model__drop_path": 0.2}
    whole = train(small(**changes))
    crash(small(**changes, out=tmp_path / "run"), 3)
    torch.manual_seed(123)
    again = train(small(**changes, out=tmp_path / "run"), resume=True)
    assert moved(tensors(whole), tensors(again)) == set()
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_000005", "step_000004"]


def test_the_run_folder_is_a_model_that_still_names_classes(small: Small, tmp_path: Path, source: Path) -> None:
    config = small(out=tmp_path / "run", optim__lr=1e-6, optim__min_lr=1e-7)
    trained = train(config)
    model = load_model(tmp_path / "run")
    images = torch.randn(2, 3, 24, 24)
    assert (model.num_registers, model.config.num_classes) == (3, 5)
    assert model.preprocess.config == load_model(source).preprocess.config
    with torch.no_grad():
        torch.testing.assert_close(model.classify(images), trained.classify(images), rtol=0, atol=0)
        torch.testing.assert_close(model.classify(images), build(config).student.classify(images), atol=0.05, rtol=0)
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["signal"] == "distill"
    assert written["config"]["model"]["registers"] == 3


def test_images_of_another_size_take_resized_positions(small: Small) -> None:
    teacher, student = build(small(model__image_size=32))
    assert teacher.config.grid == student.config.grid == (4, 4)
    assert student.preprocess.config.image_size == 32
    assert train(small(model__image_size=32, steps=1)).config.image_size == 32


def test_images_are_as_large_as_those_of_the_model_unless_a_size_is_given(
    small: Small, capsys: pytest.CaptureFixture[str], source: Path
) -> None:
    assert find("distill_registers").model.image_size is None
    for given, side, told in ((None, 24, f"as {source} reads them"), (32, 32, "as model.image_size says")):
        config = small(model__image_size=given)
        state = set_up(config, start(config))
        assert state.config.model.size == (side, side)
        images = next(state.data.batches(0, state.share, state.accelerator.device)).images
        assert images.shape == (4, 3, side, side)
        assert capsys.readouterr().err.count(f"images of {side} pixels, {told}") == 1


def test_a_model_of_oblong_images_needs_a_size(small: Small, tmp_path: Path) -> None:
    shapes = {"image_size": (24, 32), "patch_size": 8, "embed_dim": 8, "num_heads": 1, "depth": 1}
    save_model(create_model("vit_ti16", **shapes), tmp_path / "oblong")
    config = small(init=str(tmp_path / "oblong"), model__image_size=None)
    with pytest.raises(InputError, match=r"24x32 pixels, and crops are square; give --model.image_size 32"):
        set_up(config, start(config))
    assert build(override(config, {"model.image_size": 32})).student.config.size == (32, 32)


def test_models_of_other_kinds_learn_too(small: Small, tmp_path: Path) -> None:
    shapes = {"image_size": 24, "patch_size": 8, "embed_dim": 8, "num_heads": 1, "depth": 1}
    rotary = create_model("vit_ti16", **shapes, position="rope", mask_token=True)
    save_model(rotary, tmp_path / "rotary")
    bare = create_model("vit_ti16", **shapes, class_token=False, pool="avg", num_classes=3)
    save_model(bare, tmp_path / "bare")
    for name in ("rotary", "bare"):
        trained = train(small(init=str(tmp_path / name), steps=2))
        assert isinstance(trained, VisionTransformer)
        assert trained.num_registers == 3
        assert trained.registers.tokens.std() > 0


def test_small_pictures_are_enlarged_with_a_word(
    small: Small, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small(data__path=str(pictures), model__image_size=40, steps=2))
    told = capsys.readouterr().err
    assert told.count("are smaller than model.image_size=40 and are enlarged") == 1
    assert "6.png: not a readable image, the next one takes its place" in told


def test_pixels_are_those_of_the_checkpoint(small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (30, 30), (255, 102, 0)).save(folder / f"{index}.png")
    config = small(data__path=str(folder))
    state = set_up(config, start(config))
    images = next(state.data.batches(0, state.share, state.accelerator.device)).images
    expected = torch.tensor([(1 - 0.5) / 0.2, 0.0, -0.3 / 0.4]).view(1, 3, 1, 1).expand(4, 3, 24, 24)
    torch.testing.assert_close(images, expected)


def test_the_learning_rate_warms_up_and_follows_a_cosine(small: Small) -> None:
    optim = small(optim__lr=1.0, optim__min_lr=0.2, optim__warmup_steps=4, optim__weights_lr=0.1).optim
    schedule = DistillSchedule(optim, 14)
    assert [schedule.lr(step) for step in (0, 1, 4, 9, 14)] == pytest.approx([0.25, 0.5, 1.0, 0.6, 0.2])
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": [one], "lr_scale": scale} for one, scale in zip(parameters, (1.0, 0.1), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    schedule.apply(optimizer, 9)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.6, 0.06])


def test_tokens_have_the_whole_learning_rate_and_no_decay(small: Small) -> None:
    config = small(last_blocks=1, optim__weights_lr=0.1, optim__weight_decay=0.3)
    student = build(config).student
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    found = {names[id(parameter)]: tuple(key) for parameter, key in learned(student, config.optim)}
    assert {name for name, key in found.items() if key == (1.0, 0.0)} == {
        "registers.tokens", "positions.patches", "positions.cls"
    }  # fmt: skip
    assert found["blocks.2.attn.qkv.weight"] == found["patch_embed.proj.weight"] == (0.1, 0.3)
    assert found["blocks.2.norm1.weight"] == found["patch_embed.proj.bias"] == (0.1, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": None}, "init=None: registers are added to a trained model; give --init SOURCE"),
        ({"init": "nowhere"}, "nowhere"),
        ({"model__registers": 1}, r"model.registers=1 with init=.*, which has 1 already; give --model.registers 5 to"),
        ({"model__registers": 0}, "model.registers=0: there is nothing to add; give 4, say"),
        ({"last_blocks": 4}, "last_blocks=4 with init=.*, which has 3 blocks; give --last_blocks 3"),
        ({"optim__lr": 1e-6}, "optim.lr=1e-06 is below optim.min_lr=1e-05; lr is the higher one"),
        ({"optim__warmup_steps": 7}, "optim.warmup_steps=7 of steps=6; warm up for fewer steps"),
        ({"data__crop_scale": (0.5, 1.5)}, "data.crop_scale=0.5 1.5: give two shares of the area"),
        ({"model__image_size": (24, 32)}, r"model.image_size=\(24, 32\): crops are square; give one number"),
        ({"model__image_size": 7}, "image_size=7 is smaller than patch_size=8; give a larger image_size"),
        ({"model__image_size": 8}, "images of 1x1 patches cannot be shifted; give larger ones"),
        ({"strategy": "fsdp2"}, "strategy=fsdp2: the teacher is copied to every process; use ddp"),
        ({"data__path": "nowhere"}, "data.path=nowhere: no such folder; give scenes, a folder of images"),
    ],
)
def test_bad_input_is_one_line(small: Small, changes: dict[str, object], message: str) -> None:
    config = small(**changes)
    with pytest.raises(InputError, match=message) as refused:
        set_up(config, start(config))
    assert "\n" not in str(refused.value)


def test_too_few_pictures_are_refused(small: Small, pictures: Path) -> None:
    config = small(data__path=str(pictures), data__batch_size=8)
    with pytest.raises(InputError, match=r"pictures: 7 images for data.batch_size=8; give a smaller batch, or more"):
        set_up(config, start(config))


def test_test_time_registers_are_refused(small: Small, source: Path, tmp_path: Path) -> None:
    model = load_model(source)
    moved_neurons = {"neurons": [(1, 3)], "first": 2, "registers": 1, "biases": 0}
    shapes = override(model.config, {"registers": 2, "moved": moved_neurons})
    save_model(VisionTransformer(shapes, model.preprocess.config), tmp_path / "moved")
    config = small(init=str(tmp_path / "moved"))
    with pytest.raises(
        InputError, match=r"init=.*moved has test-time registers; give the model that they were added to"
    ):
        set_up(config, start(config))


def test_a_model_that_ours_cannot_hold_is_refused(small: Small, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "other").mkdir()
    save_file({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "other" / "model.safetensors")
    config = small(init=str(tmp_path / "other"))
    with pytest.raises(InputError, match="other"):
        set_up(config, start(config))


def test_the_app_adds_registers(
    app: ModuleType, source: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--data.path",
        str(pictures),
        "--data.batch_size",
        "2",
        "--data.workers",
        "0",
    ]
    lengths = ["--last_blocks", "1", "--steps", "2", "--optim.warmup_steps", "1", "--out", str(tmp_path / "out")]
    app.main(["distill_registers", "--init", str(source), *options, *lengths])
    assert load_model(tmp_path / "out").num_registers == 4
    assert load_model(tmp_path / "out").config.size == (24, 24)
    assert f"trained; next: vitreg-eval knn --model {tmp_path / 'out'}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        app.main(["distill_registers", "--data.path", str(pictures), "--out", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("init=None: registers are added to a trained model") == 1


def test_cosine_and_error_are_averaged_over_tokens() -> None:
    ours, theirs = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert distance(ours, theirs) == pytest.approx(0.5 + (1 + 1 + 0 + 1) / 4)
    assert distance(ours, ours) == pytest.approx(0.0, abs=1e-6)
    assert F.mse_loss(ours, theirs) == pytest.approx(0.75)
