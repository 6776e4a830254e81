from itertools import islice

import numpy as np
import pytest
from timm.data.distributed_sampler import RepeatAugSampler
from vitreg_core.errors import InputError
from vitreg_recipes.data import Share
from vitreg_recipes.data.order import Order, Repeated, Shuffled, Steps


def epoch_of(order: Order, share: Share, epoch: int) -> list[int]:
    """Images of one process in an epoch."""
    steps = order.epoch_steps(share)
    return np.concatenate([order.files(step, share) for step in range(epoch * steps, (epoch + 1) * steps)]).tolist()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_epoch_has_every_image_once_and_epochs_differ(processes: int) -> None:
    order = Shuffled(12, seed=0)
    shares = [Share(2, process, processes) for process in range(processes)]
    steps = range(4 * 12 // (2 * processes))
    seen = np.concatenate([order.files(step, share) for step in steps for share in shares])
    epochs = seen.reshape(4, 12)
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_a_batch_reaches_into_the_next_epoch_and_none_is_lost() -> None:
    order, share = Shuffled(7, seed=0), Share(4, 0, 1)
    seen = np.concatenate([order.files(step, share) for step in range(7)]).reshape(4, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in seen.tolist())
    assert (order.epoch_steps(share), Shuffled(2, seed=0).epoch_steps(share)) == (1, 1)


def test_the_order_is_that_of_the_seed() -> None:
    share = Share(50, 0, 1)
    assert Shuffled(50, seed=3).files(1, share).tolist() == np.random.default_rng((3, 1)).permutation(50).tolist()
    assert Shuffled(50, seed=4).files(1, share).tolist() != Shuffled(50, seed=3).files(1, share).tolist()


@pytest.mark.parametrize("processes", [1, 4, 8, 32])
@pytest.mark.parametrize("images", [1281, 300, 100])
@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_augmentation_is_timms(processes: int, images: int, repeats: int) -> None:
    order = Repeated(images, repeats)
    for process in range(processes):
        theirs = RepeatAugSampler(
            range(images), processes, process, num_repeats=repeats, selected_round=256 if images >= 256 else 0
        )
        assert len(theirs) == (images // 256 * 256 // processes or -(-images // processes))
        for epoch in (0, 1, 5):
            theirs.set_epoch(epoch)
            places = list(theirs)
            assert epoch_of(order, Share(1, process, processes), epoch) == places
            if len(places) >= 3:
                batches = len(places) // 3
                assert epoch_of(order, Share(3, process, processes), epoch) == places[: batches * 3]


@pytest.mark.parametrize(("processes", "size", "steps"), [(8, 256, 625), (32, 64, 625), (4, 256, 1251)])
def test_an_epoch_of_imagenet_has_the_steps_of_the_recipe(processes: int, size: int, steps: int) -> None:
    assert Repeated(1281167, 3).epoch_steps(Share(size, 0, processes)) == steps


def test_copies_of_an_image_go_to_different_processes() -> None:
    dealt = np.stack([Repeated(256, 3).files(0, Share(4, process, 3)) for process in range(3)])
    assert (dealt == dealt[0]).all()
    assert len(set(dealt[0].tolist())) == 4


def test_an_epoch_without_a_batch_is_an_error() -> None:
    with pytest.raises(
        InputError,
        match=r"data.batch_size=200 with data.repeats=3: an epoch of 150 images has 75 per process.*"
        "; give a smaller batch, or repeats=1",
    ):
        Repeated(150, 3).epoch_steps(Share(100, 0, 2))


@pytest.mark.parametrize("order", [Shuffled(10, seed=0), Repeated(300, 3)])
def test_any_step_can_be_the_first_and_places_are_never_shared(order: Order) -> None:
    shares = [Share(3, process, 2) for process in range(2)]
    whole = [list(islice(Steps(order, 0, share), 90)) for share in shares]
    for share, batches in zip(shares, whole, strict=True):
        assert list(islice(Steps(order, 55, share), 10)) == batches[55:65]
    places = [place for batches in whole for batch in batches for place, _ in batch]
    assert sorted(places) == list(range(2 * 90 * 3))
