import random
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from vitreg_core.data.images import labelled_images
from vitreg_core.data.scenes import NUM_RELATIONS, SHAPES, TEXTURES, draw_scenes
from vitreg_core.errors import InputError
from vitreg_recipes.augment import seeded
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data import Share, Steps, open_data

Tiny = Callable[..., TrainConfig]
CPU = torch.device("cpu")
ALONE = Share(size=4, process=0, processes=1)


def images(config: TrainConfig, count: int, *, step: int = 0, share: Share = ALONE) -> Tensor:
    """Images of some steps, one after the other."""
    return torch.cat([batch.images for batch in islice(open_data(config).batches(step, share, CPU), count)])


@pytest.mark.parametrize("label", ["class", "relation"])
def test_scenes_are_those_of_their_step_and_process(tiny: Tiny, label: str) -> None:
    config = tiny(seed=7, data__label=label)
    share = Share(size=4, process=1, processes=2)
    batch = next(open_data(config).batches(3, share, CPU))
    scenes = draw_scenes(4, (7, 3, 1), image_size=16)
    torch.testing.assert_close(batch.images, scenes.image * 2 - 1)
    assert torch.equal(batch.labels, scenes.relation if label == "relation" else scenes.label)
    assert not torch.equal(batch.images, images(config, 1, step=3))


def test_classes_are_those_of_the_data(tiny: Tiny, photos: Path) -> None:
    assert open_data(tiny(data__label="class")).classes == list(TEXTURES)
    relations = open_data(tiny(data__label="relation")).classes
    assert (len(relations), relations[len(SHAPES) + 1]) == (NUM_RELATIONS, f"{TEXTURES[1]}, {SHAPES[1]}")
    assert open_data(tiny(data__path=str(photos))).classes == ["cat", "dog"]
    assert open_data(tiny(data__path=str(photos / "train"))).classes == ["cat", "dog"]


def test_photos_are_the_same_for_any_workers_and_any_start(tiny: Tiny, photos: Path) -> None:
    config = tiny(data__path=str(photos))
    whole = images(config, 4)
    assert torch.equal(whole, images(tiny(data__path=str(photos), data__workers=2), 4))
    assert torch.equal(whole[8:], images(config, 2, step=2))
    assert not torch.equal(whole, images(tiny(data__path=str(photos), seed=1), 4))


def test_photos_are_the_same_over_any_number_of_processes(tiny: Tiny, photos: Path) -> None:
    config = tiny(data__path=str(photos))
    shares = [images(config, 1, step=1, share=Share(size=2, process=rank, processes=2)) for rank in range(2)]
    assert torch.equal(torch.cat(shares), images(config, 1, step=1))


def test_an_epoch_has_every_image_once_and_epochs_differ() -> None:
    pairs = [pair for step in islice(Steps(7, 0, 0, ALONE), 7) for pair in step]
    assert [place for place, _ in pairs] == list(range(28))
    epochs = [[file for _, file in pairs[start : start + 7]] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_labels_belong_to_the_images(tiny: Tiny, photos: Path) -> None:
    shutil.rmtree(photos / "train" / "cat")
    (photos / "train" / "bird").mkdir()
    for path in (photos / "train" / "dog").iterdir():
        shutil.copy(path, photos / "train" / "bird")
    files, pairs = labelled_images(photos / "train"), next(iter(Steps(8, 0, 0, ALONE)))
    batch = next(open_data(tiny(data__path=str(photos))).batches(0, ALONE, CPU))
    assert batch.labels.tolist() == [files.labels[index] for _, index in pairs]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_and_named_once(
    tiny: Tiny, photos: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    broken = photos / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    data = open_data(tiny(data__path=str(photos), data__workers=workers))
    batches = list(islice(data.batches(0, ALONE, CPU), 7))
    assert all(batch.images.isfinite().all() for batch in batches)
    assert data.skipped == {str(broken)}
    assert capsys.readouterr().err.count("dog/1.png: not a readable image, the next one takes its place") == 1


def test_too_many_unreadable_images_are_an_error(tiny: Tiny, photos: Path) -> None:
    for path in list(photos.rglob("*.png"))[:4]:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"train: 4 of 7 images cannot be read, such as .*png; mend or remove them"):
        images(tiny(data__path=str(photos)), 7)


def test_a_folder_without_images_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 class folders found"):
        open_data(tiny(data__path=str(tmp_path)))
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match="0 images found"):
        open_data(tiny(data__path=str(tmp_path)))


def seed_all() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def test_seeded_draws_the_same_and_leaves_the_generators_alone() -> None:
    def draw() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002

    seed_all()
    without = draw()
    seed_all()
    with seeded(3, 4):
        inside = draw()
    assert draw() == without
    with seeded(3, 4):
        assert draw() == inside
    with seeded(3, 5):
        assert draw() != inside
