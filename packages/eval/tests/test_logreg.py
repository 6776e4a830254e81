from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from vitreg_core import VisionTransformer, ViTConfig
from vitreg_core.errors import InputError
from vitreg_eval.config import LogregOptions
from vitreg_eval.extract import Extracted
from vitreg_eval.labelled_features import hold_out
from vitreg_eval.logistic import STRENGTHS
from vitreg_eval.results import DataRecord
from vitreg_eval.tasks import logreg

RECORD = DataRecord(name="made", split="val", n=1, hash="0")


def samples(count: int, seed: int, classes: int = 4, dim: int = 8) -> Extracted:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, classes, (count,), generator=generator)
    features = centres[labels] + 1.5 * torch.randn(count, dim, generator=generator)
    return Extracted({"cls": features[:, None]}, {"label": labels}, RECORD, (1, 1))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> tuple[float, ...]:
    """A path of five penalties."""
    strengths = STRENGTHS[4:41:9]
    monkeypatch.setattr(logreg, "STRENGTHS", strengths)
    return strengths


def test_the_best_c_on_the_held_out_tenth_is_fitted_on_all_as_by_scikit_learn(few: tuple[float, ...]) -> None:
    train, test = samples(500, 0), samples(300, 1)
    x, y = train.cls.double().numpy(), train.targets["label"].numpy()
    held = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:50].numpy()
    rest = np.setdiff1d(np.arange(500), held)
    fits = [LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x[rest], y[rest]) for c in few]
    best = few[int(np.argmax([fit.score(x[held], y[held]) for fit in fits]))]
    expected = LogisticRegression(C=best, tol=1e-8, max_iter=5000).fit(x, y)
    found = logreg.evaluate(train, test, LogregOptions())
    assert found["C"].value == best
    truth = test.targets["label"].numpy()
    assert found["top1"].value == pytest.approx(expected.score(test.cls.double().numpy(), truth))


def test_the_choice_does_not_depend_on_the_test_set(few: tuple[float, ...]) -> None:
    train = samples(300, 0)
    found = [logreg.evaluate(train, samples(200, seed), LogregOptions())["C"] for seed in (1, 2)]
    assert found[0].value == found[1].value
    assert found[0].value in few


def test_shuffled_labels_give_chance(few: tuple[float, ...]) -> None:
    train, test = samples(400, 0), samples(2000, 1)
    assert logreg.evaluate(train, test, LogregOptions())["top1"].value > 0.5
    hits = []
    for seed in range(6):
        order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
        shuffled = Extracted(train.parts, {"label": train.targets["label"][order]}, RECORD, (1, 1))
        hits.append(logreg.evaluate(shuffled, test, LogregOptions(seed=seed))["top1"].value)
    assert abs(np.mean(hits) - 0.25) < 4 * np.std(hits, ddof=1) / 6**0.5 < 0.2


def test_held_out_images_are_a_seeded_part_and_never_nothing() -> None:
    rest, held = hold_out(100, 0.1, 3)
    assert len(held) == 10
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(100))
    assert torch.equal(held, hold_out(100, 0.1, 3)[1])
    assert not torch.equal(held, hold_out(100, 0.1, 4)[1])
    assert len(hold_out(100, 0.0, 0)[1]) == 0
    with pytest.raises(InputError, match=r"--held_out 0\.1 of 4 training images are 0"):
        hold_out(4, 0.1, 0)


def test_scenes_give_top1_and_c_and_say_how_it_was_chosen(few: tuple[float, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3)
    outcome = logreg.run(VisionTransformer(config).eval(), LogregOptions(train_images=60, test_images=40), tmp_path)
    assert list(outcome.metrics) == ["top1", "C"]
    assert outcome.metrics["top1"].ci95 is not None
    assert outcome.notes[0] == f"C = {outcome.metrics['C'].value:.3g} chosen on 10% of train, then fitted on all of it"
