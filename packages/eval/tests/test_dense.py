from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vitreg_core import VisionTransformer, ViTConfig
from vitreg_core.errors import InputError
from vitreg_eval.dense import (
    STATE,
    Draw,
    HeadSchedule,
    draws,
    feature_maps,
    pad_to_multiple,
    prefetched,
    train_head,
)
from vitreg_eval.processes import Processes

FEATURES = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(0, 3, (10,), generator=torch.Generator().manual_seed(1))


class Killed(Exception):  # noqa: N818 (no error of the program)
    """The end of a process."""


def make_head() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(6), nn.Linear(6, 3))


def batches(step: int) -> tuple[Tensor, Tensor]:
    chosen = torch.tensor([draw.index for draw in draws(10, 4, 7, step)])
    return FEATURES[chosen], TARGETS[chosen]


def loss(logits: Tensor, targets: Tensor, step: int) -> Tensor:
    return F.cross_entropy(logits, targets)


def train(
    head: nn.Module, out: Path | None = None, *, last: int = 99, identity: str = "a", steps: int = 12
) -> nn.Module:
    def until(step: int) -> tuple[Tensor, Tensor]:
        if step > last:
            raise Killed
        return batches(step)

    schedule = HeadSchedule(steps, lambda step: 0.1 * (1 - step / 12), save_every=5)
    train_head(head, until, loss, schedule, seed=3, out=out, identity=identity)
    return head


def values(head: nn.Module) -> list[Tensor]:
    return list(head.state_dict().values())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(values(a), values(b), strict=True))


# The loop


def test_a_killed_training_goes_on_to_the_same_weights_bit_by_bit(tmp_path: Path) -> None:
    straight = train(make_head())
    with pytest.raises(Killed):
        train(make_head(), tmp_path, last=7)
    steps: list[int] = []

    def watched(step: int) -> tuple[Tensor, Tensor]:
        steps.append(step)
        return batches(step)

    resumed = nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(6), nn.Linear(6, 3))  # other first weights
    schedule = HeadSchedule(12, lambda step: 0.1 * (1 - step / 12), save_every=5)
    train_head(resumed, watched, loss, schedule, seed=3, out=tmp_path, identity="a")
    assert steps == list(range(5, 12))
    assert same(straight, resumed)
    assert not resumed.training
    again = train(make_head(), tmp_path, last=-1)  # all done: no batch is asked for
    assert same(straight, again)


def test_a_state_of_other_settings_is_not_used(tmp_path: Path) -> None:
    train(make_head(), tmp_path, identity="a", steps=5)
    other = train(make_head(), tmp_path, identity="b")
    assert same(other, train(make_head()))


@pytest.mark.parametrize("content", [b"no state", b"", None])
def test_a_damaged_state_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        torch.save({"identity": "a", "steps": 3, "head": {}, "optimizer": {}}, tmp_path / STATE)
    else:
        (tmp_path / STATE).write_bytes(content)
    if content == b"":
        train(make_head(), tmp_path, steps=1)  # nothing was kept
        return
    with pytest.raises(InputError, match=rf"{STATE}: not a readable state of a head .*; remove it"):
        train(make_head(), tmp_path)


def test_a_state_that_cannot_be_written_is_one_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match=r"out: cannot be made .*; give another --out"):
        train(make_head(), tmp_path / "out")
    train(make_head(), tmp_path / "state", steps=5)
    before = (tmp_path / "state" / STATE).read_bytes()

    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"state/head_state.pt: cannot be written \(No space left on device\)"):
        train(make_head(), tmp_path / "state")
    assert [path.name for path in (tmp_path / "state").iterdir()] == [STATE]
    assert (tmp_path / "state" / STATE).read_bytes() == before


def test_the_training_is_that_of_adamw_written_out() -> None:
    ours, theirs = nn.Linear(6, 3), nn.Linear(6, 3)
    theirs.load_state_dict(ours.state_dict())
    schedule = HeadSchedule(
        4, lambda step: 0.1 / (step + 1), weight_decay=0.3, betas=lambda step: (0.8 + step / 20, 0.99), grad_clip=0.5
    )
    train_head(ours, batches, loss, schedule, seed=0)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.3)
    for step in range(4):
        optimizer.param_groups[0].update(lr=0.1 / (step + 1), betas=(0.8 + step / 20, 0.99))
        inputs, targets = batches(step)
        optimizer.zero_grad()
        F.cross_entropy(theirs(inputs), targets).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
    assert same(ours, theirs)


def test_a_head_that_diverges_is_an_error() -> None:
    schedule = HeadSchedule(3, lambda step: float("nan"))
    with pytest.raises(InputError, match="step 2: the head has weights that are not finite"):
        train_head(make_head(), batches, loss, schedule, seed=0)


def test_the_training_leaves_the_random_numbers_of_others_alone() -> None:
    head = make_head()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train(head)
    assert torch.equal(torch.rand(3), expected)


# Batches


def test_every_picture_comes_once_before_any_comes_again() -> None:
    seen = [draw.index for step in range(5) for draw in draws(10, 4, 0, step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    seeds = [draw.seed for step in range(5) for draw in draws(10, 4, 0, step)]
    assert len(set(seeds)) == 20
    assert draws(10, 4, 0, 3) == draws(10, 4, 0, 3)
    assert draws(10, 4, 0, 3) != draws(10, 4, 1, 3)


def test_processes_share_the_batch_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = draws(10, 4, 0, 3)
    parts: list[Draw] = []
    for rank in range(2):
        monkeypatch.setattr("vitreg_eval.dense.this_process", lambda rank=rank: Processes(rank, 2))
        parts += draws(10, 4, 0, 3)
    assert Counter(parts) == Counter(alone)
    with pytest.raises(InputError, match="--batch_size 5 over 2 processes; give a multiple"):
        draws(10, 5, 0, 0)


def test_pictures_are_prepared_ahead_in_order_from_any_step() -> None:
    def prepare(draw: Draw) -> tuple[int, int]:
        return draw.index, draw.seed

    batch = prefetched(prepare, 10, 4, seed=2, steps=6)
    found = [batch(step) for step in range(3, 6)]
    assert found == [[prepare(draw) for draw in draws(10, 4, 2, step)] for step in range(3, 6)]


# Maps


@pytest.mark.parametrize(
    ("size", "padded", "top", "left"), [((480, 640), (490, 644), 5, 2), ((28, 43), (28, 56), 0, 6)]
)
def test_padding_is_centred_and_an_odd_pixel_goes_right(
    size: tuple[int, int], padded: tuple[int, int], top: int, left: int
) -> None:
    image = torch.ones(1, 3, *size)
    found = pad_to_multiple(image, 14)
    assert found.shape[-2:] == padded
    assert found.sum() == image.sum()
    assert found[0, 0, top, left] == found[0, 0, top + size[0] - 1, left + size[1] - 1] == 1
    assert left == 0 or found[0, 0, top, left - 1] == 0


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, registers=2)
    ).eval()


def test_maps_hold_the_normed_patches_of_each_layer_and_no_other_token(model: VisionTransformer) -> None:
    images = torch.randn(2, 3, 30, 41)
    maps = feature_maps(model, images, (-2, -1), "fp32")
    assert maps.shape == (2, 48, 4, 6)
    with torch.no_grad():
        layers = model.intermediate(pad_to_multiple(images, 8), (1, 2))
    torch.testing.assert_close(maps[1, :24, 2, 3], layers[0].patches[1, 2 * 6 + 3])
    torch.testing.assert_close(maps[1, 24:, 2, 3], layers[1].patches[1, 2 * 6 + 3])
