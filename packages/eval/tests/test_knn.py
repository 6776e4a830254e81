import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_eval.config import KnnOptions
from vitreg_eval.extract import Extracted
from vitreg_eval.results import DataRecord
from vitreg_eval.tasks import knn

RECORD = DataRecord(name="made", split="val", n=1, hash="0")


def samples(count: int, seed: int, classes: int = 4, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, classes, (count,), generator=generator)
    return centres[labels] + 1.3 * torch.randn(count, dim, generator=generator), labels


def extracted(features: torch.Tensor, labels: torch.Tensor) -> Extracted:
    return Extracted({"cls": features[:, None]}, {"label": labels}, RECORD, (1, 1))


def weigh(distances: np.ndarray) -> np.ndarray:
    weights = np.exp((1 - distances) / 0.07)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("rows", [(512, 16384), (7, 31)])
def test_votes_equal_scikit_learn_for_every_k(monkeypatch: pytest.MonkeyPatch, rows: tuple[int, int]) -> None:
    monkeypatch.setattr(knn, "TEST_ROWS", rows[0])
    monkeypatch.setattr(knn, "TRAIN_ROWS", rows[1])
    (train, labels), (test, _) = samples(300, 0), samples(90, 1)
    votes = knn.knn_votes(train, labels, test, ks=(1, 7, 40), temperature=0.07)
    for k, found in votes.items():
        theirs = KNeighborsClassifier(k, weights=weigh, metric="cosine", algorithm="brute")
        theirs.fit(train.numpy(), labels.numpy())
        shares = (found / found.sum(dim=1, keepdim=True)).numpy()
        np.testing.assert_allclose(shares, theirs.predict_proba(test.numpy()), atol=1e-4)
        assert (found.argmax(dim=1).numpy() == theirs.predict(test.numpy())).all()


@pytest.mark.parametrize("chunk", [4, 1000])
def test_of_equally_similar_samples_the_first_vote(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(knn, "TRAIN_ROWS", chunk)
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).repeat(20, 1)
    _, nearest = knn.neighbours(bank, torch.tensor([[1.0, 0.0]]), 25)
    assert nearest[0].tolist() == [*range(0, 60, 3), *range(2, 17, 3)]


def test_scaling_features_changes_nothing() -> None:
    (train, labels), (test, _) = samples(200, 0), samples(50, 1)
    scale = torch.rand(200, 1) * 10 + 0.1
    plain = knn.knn_votes(train, labels, test, ks=(20,), temperature=0.07)[20]
    scaled = knn.knn_votes(train * scale, labels, test * 3, ks=(20,), temperature=0.07)[20]
    torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-4)


def test_rows_of_classes_vote_for_all_that_are_there() -> None:
    train, test = torch.eye(3), torch.eye(3)[:1]
    rows = torch.tensor([[1, 1, 0], [0, 0, 1], [-1, 1, 0]])
    votes = knn.knn_votes(train, rows, test, ks=(1, 3), temperature=0.5)
    weights = torch.tensor([2.0, 0.0, 0.0]).softmax(dim=0)
    torch.testing.assert_close(votes[3][0], torch.stack([weights[0], weights[0] + weights[2], weights[1]]))
    torch.testing.assert_close(votes[1][0], weights[0] * torch.tensor([1.0, 1.0, 0.0]))


def test_one_k_gives_top1_and_several_are_named() -> None:
    train, test = (extracted(*samples(300, seed)) for seed in (0, 1))
    several = knn.evaluate(train, test, KnnOptions(k=(10, 20)))
    assert list(several) == ["top1_k10", "top1_k20"]
    alone = knn.evaluate(train, test, KnnOptions(k=20))
    assert alone == {"top1": several["top1_k20"]}
    rows = torch.nn.functional.one_hot(test.targets["label"], 4)
    multi = Extracted(train.parts, {"label": torch.nn.functional.one_hot(train.targets["label"], 4)}, RECORD, (1, 1))
    assert list(knn.evaluate(multi, extracted(test.cls, rows), KnnOptions())) == ["map"]


def test_k_takes_several_numbers() -> None:
    assert override(KnnOptions(), {"k": ("10,20", "100", "20")}).k == (10, 20, 100)
    assert KnnOptions(k=5).k == (5,)
    for wrong in ("ten", "0", "", "-3"):
        with pytest.raises(InputError, match="k="):
            override(KnnOptions(), {"k": (wrong,)})


def test_more_neighbours_than_images_are_refused() -> None:
    with pytest.raises(InputError, match="k=20 neighbours of only 5 training images; give a smaller --k"):
        knn.knn_votes(
            torch.zeros(5, 2), torch.zeros(5, dtype=torch.long), torch.zeros(1, 2), ks=(5, 20), temperature=1.0
        )


def test_shuffled_labels_give_chance() -> None:
    (train, labels), (test, truth) = samples(600, 0), samples(2000, 1)
    assert knn.evaluate(extracted(train, labels), extracted(test, truth), KnnOptions())["top1"].value > 0.5
    hits = []
    for seed in range(8):
        shuffled = labels[torch.randperm(600, generator=torch.Generator().manual_seed(seed))]
        votes = knn.knn_votes(train, shuffled, test, ks=(20,), temperature=0.07)[20]
        hits.append((votes.argmax(dim=1) == truth).float().mean().item())
    assert abs(np.mean(hits) - 0.25) < 4 * np.std(hits, ddof=1) / np.sqrt(8) < 0.1
