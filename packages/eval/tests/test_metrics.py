import math
import time

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_eval.metrics import (
    Metric,
    bootstrap_ci,
    box_iou_at_least_half,
    class_areas,
    confusion_matrix,
    corloc,
    depth_errors,
    mean,
    measure,
    miou,
    pixel_accuracy,
    pooled_miou,
    pooled_pixel_accuracy,
    top_k,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_labels(classes: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(classes, shape, generator=generator(seed))


def guesses(labels: Tensor, classes: int, *, seed: int) -> Tensor:
    """Labels of which about half are replaced at random."""
    other = random_labels(classes, *labels.shape, seed=seed)
    return other.where(torch.rand(labels.shape, generator=generator(seed + 1)) < 0.5, labels)


# Boxes


@pytest.mark.parametrize(
    ("other", "enough"),
    [
        ([0, 0, 10, 10], True),
        ([0, 0, 10, 20], True),  # 100 / 200
        ([0, 0, 10, 21], False),  # 100 / 210
        ([0, 0, 10, 5], True),  # 50 / 100
        ([0, 1, 10, 5], False),  # 40 / 100
        ([5, 0, 15, 10], False),  # 50 / 150
        ([2, 1, 12, 11], True),  # 72 / 128
        ([3, 1, 13, 11], False),  # 63 / 137
        ([10, 0, 20, 10], False),  # side by side
        ([20, 20, 10, 10], False),  # ends before it starts
        ([12, 12, 8, 8], False),
        ([5, 5, 5, 5], False),
    ],
)
def test_half_is_enough_and_less_is_not(other: list[int], enough: bool) -> None:  # noqa: FBT001
    box = torch.tensor([0, 0, 10, 10])
    assert box_iou_at_least_half(box, torch.tensor([other])).tolist() == [enough]


def test_overlaps_are_those_of_painted_pixels() -> None:
    corners = torch.randint(0, 13, (100, 2, 2), generator=generator()).sort(dim=1).values
    boxes, hits = corners.flatten(1), 0
    painted = torch.zeros(100, 12, 12, dtype=torch.bool)
    for canvas, (x0, y0, x1, y1) in zip(painted, boxes.tolist(), strict=True):
        canvas[y0:y1, x0:x1] = True
    for box, canvas in zip(boxes, painted, strict=True):
        shared = (canvas & painted).sum(dim=(1, 2))
        union = (canvas | painted).sum(dim=(1, 2))
        expected = (shared > 0) & (shared / union >= 0.5)
        assert torch.equal(box_iou_at_least_half(box, boxes), expected)
        hits += int(expected.sum())
    assert hits > 200


def test_an_exact_half_of_a_large_box_counts() -> None:
    box = torch.tensor([0, 0, 40_001, 60_000], dtype=torch.int32)
    assert box_iou_at_least_half(box, torch.tensor([[0, 0, 40_001, 30_000]], dtype=torch.int32)).all()
    assert not box_iou_at_least_half(box, torch.tensor([[0, 0, 40_001, 29_999]], dtype=torch.int32)).any()


def test_corloc_takes_the_best_object_and_keeps_images_without_any() -> None:
    predicted = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    targets = [
        torch.tensor([[50, 50, 60, 60], [0, 0, 10, 20]]),  # the second is exactly half
        torch.tensor([[0, 0, 10, 21]]),
        torch.empty(0, 4, dtype=torch.int64),
        torch.tensor([[1, 1, 10, 10]]),
    ]
    hits = corloc(predicted, targets)
    assert hits.tolist() == [True, False, False, True]
    assert measure(hits).value == 0.5


# Classes


@pytest.mark.parametrize("k", [1, 5])
def test_top_k_matches_sklearn(k: int) -> None:
    from sklearn.metrics import top_k_accuracy_score

    logits = torch.randn(500, 10, generator=generator())
    labels = random_labels(10, 500, seed=1)
    theirs = top_k_accuracy_score(labels, logits, k=k, labels=range(10))
    assert top_k(logits, labels, k).double().mean().item() == pytest.approx(theirs)


def test_of_equal_scores_the_first_class_wins() -> None:
    assert top_k(torch.zeros(3, 4), torch.tensor([0, 1, 3])).tolist() == [True, False, False]
    assert top_k(torch.zeros(3, 4), torch.tensor([0, 1, 3]), 2).tolist() == [True, True, False]


def test_scores_that_are_not_numbers_are_no_hits_but_an_error() -> None:
    logits = torch.zeros(3, 4)
    logits[2, 1] = math.nan
    with pytest.raises(InputError, match="scores of image 2 are not numbers; run the model in fp32"):
        top_k(logits, torch.tensor([0, 0, 0]))


@pytest.mark.parametrize("k", [0, 5])
def test_k_stays_within_the_classes(k: int) -> None:
    with pytest.raises(InputError, match=f"top-{k} accuracy over 4 classes; use k from 1 to 4"):
        top_k(torch.zeros(1, 4), torch.tensor([0]), k)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_name_classes(label: int) -> None:
    with pytest.raises(InputError, match=f"label {label} is none of the 4 classes; they count from 0 to 3"):
        top_k(torch.zeros(1, 4), torch.tensor([label]))
    with pytest.raises(InputError, match=f"label {label} is none of the 4 classes"):
        confusion_matrix(torch.tensor([1]), torch.tensor([label]), 4)
    with pytest.raises(InputError, match=f"prediction {label} is none of the 4 classes"):
        confusion_matrix(torch.tensor([label]), torch.tensor([1]), 4)


def test_confusion_matches_sklearn_without_ignored_pixels() -> None:
    from sklearn.metrics import accuracy_score, jaccard_score
    from sklearn.metrics import confusion_matrix as sklearn_confusion

    labels = random_labels(7, 3, 20, 30, seed=0)
    predicted = guesses(labels, 7, seed=1)
    labels[0, :5] = 255
    kept = labels != 255
    truth, guess = labels[kept].numpy(), predicted[kept].numpy()
    confusion = confusion_matrix(predicted, labels, 7)
    np.testing.assert_array_equal(confusion.numpy(), sklearn_confusion(truth, guess, labels=range(7)))
    assert miou(confusion).item() == pytest.approx(jaccard_score(truth, guess, average="macro"))
    assert pixel_accuracy(confusion).item() == pytest.approx(accuracy_score(truth, guess))


def test_miou_matches_sklearn_where_classes_are_absent() -> None:
    from sklearn.metrics import jaccard_score

    labels = random_labels(5, 40, 30, seed=2) * 2  # the odd ones of 12 classes and the last stay out
    predicted = guesses(labels, 4, seed=3)  # 1 and 3 are predicted and never right
    labels[:, :4] = 255
    kept = labels != 255
    theirs = jaccard_score(labels[kept], predicted[kept], average="macro")
    assert miou(confusion_matrix(predicted, labels, 12)).item() == pytest.approx(theirs)


def test_miou_by_hand() -> None:
    confusion = torch.tensor([[3, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert miou(confusion).item() == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert pixel_accuracy(confusion).item() == pytest.approx(7 / 10)


def test_an_ignored_label_may_be_chosen() -> None:
    confusion = confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, -1]), 2, ignore=-1)
    assert confusion.tolist() == [[1, 1], [0, 0]]


# Depth


def test_depth_errors_match_sklearn_per_image() -> None:
    from sklearn.metrics import mean_absolute_percentage_error, root_mean_squared_error

    depth = torch.rand(4, 12, 16, generator=generator()) * 12 - 1  # some below 0, some beyond 10
    predicted = depth + torch.randn(4, 12, 16, generator=generator(1))
    errors = depth_errors(predicted, depth)
    for image in range(4):
        valid = (depth[image] > 1e-3) & (depth[image] < 10)
        truth, guess = depth[image][valid].double(), predicted[image][valid].double().clamp(1e-3, 10)
        assert errors.rmse[image].item() == pytest.approx(root_mean_squared_error(truth, guess))
        assert errors.abs_rel[image].item() == pytest.approx(mean_absolute_percentage_error(truth, guess))
        share = np.mean([max(t / g, g / t) < 1.25 for t, g in zip(truth.tolist(), guess.tolist(), strict=True)])
        assert errors.delta1[image].item() == pytest.approx(share)


def test_depth_errors_by_hand_average_over_images_not_pixels() -> None:
    depth = torch.tensor([[[2.0, 4.0]], [[1.0, 0.0]]])
    predicted = torch.tensor([[[3.0, 4.5]], [[20.0, 5.0]]])
    errors = depth_errors(predicted, depth)
    assert errors.rmse.tolist() == pytest.approx([math.sqrt(1.25 / 2), 9.0])
    assert errors.abs_rel.tolist() == pytest.approx([(0.5 + 0.125) / 2, 9.0])
    assert errors.delta1.tolist() == [0.5, 0.0]
    assert measure(errors.rmse).value == pytest.approx((math.sqrt(0.625) + 9) / 2)


def test_a_factor_of_exactly_1_25_is_not_below_it_and_the_limits_are_not_inside() -> None:
    depth = torch.tensor([[[4.0, 10.0, 0.5]]])
    predicted = torch.tensor([[[5.0, 3.0, 3.0]]])
    errors = depth_errors(predicted, depth, minimum=0.5)
    assert (errors.rmse.item(), errors.delta1.item()) == (1.0, 0.0)


def test_an_image_without_depth_is_named() -> None:
    depth = torch.ones(3, 2, 2)
    depth[1] = 0
    with pytest.raises(InputError, match=r"image 1 of the batch has no true depth between 0.001 and 10.0 m; leave it"):
        depth_errors(torch.ones(3, 2, 2), depth)


def test_predicted_depth_must_be_a_number_where_it_counts() -> None:
    depth, predicted = torch.ones(2, 2, 2), torch.ones(2, 2, 2)
    predicted[1, 0, 0] = math.nan
    with pytest.raises(InputError, match="image 1 of the batch has predicted depths that are not numbers; run in fp32"):
        depth_errors(predicted, depth)
    depth[1, 0, 0] = 0
    assert depth_errors(predicted, depth).rmse.tolist() == [0, 0]


# Intervals


@pytest.mark.parametrize("kind", ["values", "hits"])
def test_intervals_match_scipy(kind: str) -> None:
    from scipy.stats import bootstrap

    values = torch.rand(120, generator=generator()).square()
    per_image = values < 0.3 if kind == "hits" else values
    low, high = bootstrap_ci(per_image, repeats=10_000)
    theirs = bootstrap(
        (per_image.double().numpy(),), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.03 * width)
    assert high == pytest.approx(theirs.high, abs=0.03 * width)


def confusions(images: int, classes: int) -> Tensor:
    labels = random_labels(classes, images, 64, seed=5)
    predicted = guesses(labels, classes, seed=6)
    predicted[: images // 3] = 0  # images differ
    return torch.stack([confusion_matrix(p, t, classes) for p, t in zip(predicted, labels, strict=True)])


def test_the_interval_of_miou_matches_scipy_over_summed_matrices() -> None:
    from scipy.stats import bootstrap

    per_image = confusions(30, 4)

    def statistic(images: np.ndarray) -> float:
        return miou(per_image[torch.from_numpy(images)].sum(dim=0)).item()

    rng = np.random.default_rng(1)
    low, high = bootstrap_ci(class_areas(per_image), pooled_miou, repeats=4000)
    theirs = bootstrap(
        (np.arange(30),),
        statistic,
        n_resamples=4000,
        method="percentile",
        vectorized=False,
        rng=rng,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.06 * width)
    assert high == pytest.approx(theirs.high, abs=0.06 * width)


def test_statistics_weigh_images_by_how_often_they_were_drawn() -> None:
    per_image, counts = confusions(5, 4), torch.tensor([[2.0, 0, 0, 1, 2], [1, 1, 1, 1, 1]], dtype=torch.float64)
    sums = [per_image[torch.tensor(drawn)].sum(dim=0) for drawn in ([0, 0, 3, 4, 4], [0, 1, 2, 3, 4])]
    areas = class_areas(per_image)
    assert pooled_miou(areas, counts).tolist() == pytest.approx([miou(total).item() for total in sums])
    assert pooled_pixel_accuracy(areas, counts).tolist() == pytest.approx(
        [pixel_accuracy(total).item() for total in sums]
    )
    assert mean(torch.tensor([1.0, 2, 3, 4, 5]), counts).tolist() == pytest.approx([16 / 5, 3])


def test_a_seed_fixes_the_interval() -> None:
    values = torch.rand(50, generator=generator())
    assert bootstrap_ci(values, seed=3) == bootstrap_ci(values.numpy(), seed=3)
    assert bootstrap_ci(values, seed=3) != bootstrap_ci(values, seed=4)


@pytest.mark.parametrize(("room", "parts"), [(2**22, [101]), (400, [10] * 10 + [1]), (1, [1] * 101)])
def test_many_images_are_drawn_in_parts(room: int, parts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    values, seen = torch.rand(40, generator=generator()), []
    whole = bootstrap_ci(values, repeats=101)

    def recorded(per_image: Tensor, counts: Tensor) -> Tensor:
        assert (counts.sum(dim=1) == 40).all()
        seen.append(len(counts))
        return mean(per_image, counts)

    monkeypatch.setattr("vitreg_eval.metrics.DRAWS_AT_ONCE", room)
    assert bootstrap_ci(values, recorded, repeats=101) == pytest.approx(whole, rel=0.05)
    assert seen == parts


def test_the_full_ade20k_validation_takes_seconds() -> None:
    per_image = torch.eye(150, dtype=torch.int32).expand(2000, 150, 150)
    start = time.process_time()
    assert bootstrap_ci(class_areas(per_image), pooled_miou) == (1.0, 1.0)
    assert time.process_time() - start < 10


def test_an_interval_needs_two_images() -> None:
    with pytest.raises(InputError, match="a 95 % interval over 1 images; measure at least 2"):
        bootstrap_ci(torch.ones(1))


def test_a_measurement_holds_its_value_count_and_interval() -> None:
    values = torch.tensor([0.0, 1, 1, 1])
    metric = measure(values, seed=2)
    assert (metric.value, metric.n, metric.ci95) == (0.75, 4, bootstrap_ci(values, seed=2))
    assert metric.model_dump(mode="json") == {"value": 0.75, "n": 4, "ci95": list(metric.ci95)}
    assert measure(torch.tensor([0.25])) == Metric(value=0.25, n=1, ci95=None)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(InputError, match="0 images; check the data folder and the split"):
        measure(torch.empty(0))


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(InputError, match="2 images give the score nan; check that they have labels"):
        measure(torch.zeros(2, 3, 3), pooled_miou)


@pytest.mark.parametrize("change", [{"n": -1}, {"value": math.nan}, {"ci95": (0.0, math.inf)}, {"unit": "m"}])
def test_a_metric_is_finite_and_has_no_other_fields(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Metric(**{"value": 0.5, "n": 2, "ci95": (0.4, 0.6)} | change)
