"""The criterion of outliers on planted answers, closed forms and scikit-learn.

Few sets of each law are drawn here. Twelve of each, and their table (half a minute):
`VITREG_FULL_DEPTH=1 OMP_NUM_THREADS=1 uv run pytest -n 0 packages/core/tests/test_outliers.py -k full_depth -s`
"""

import os
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from jaxtyping import Float
from sklearn.mixture import GaussianMixture
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone, Features
from vitreg_core.outliers import (
    OutlierRule,
    emergence_block,
    expectation_maximisation,
    find_outliers,
    fit,
    make_histogram,
    patch_norms,
    starting_cuts,
)

BULKS = {
    "normal": lambda rng, shape: rng.normal(0, 0.2, shape),
    "gumbel": lambda rng, shape: rng.gumbel(0, 0.156, shape),
    "gamma": lambda rng, shape: rng.gamma(4, 0.1, shape),
    "exponential": lambda rng, shape: rng.exponential(0.2, shape),
    "laplace": lambda rng, shape: rng.laplace(0, 0.14, shape),
    "t3": lambda rng, shape: 0.115 * rng.standard_t(3, shape),
}


TABLE = [
    ("normal", 0.024, 8, 1.0, 1.0),
    ("normal", 0.03, 3, 0.99, 0.99),
    ("normal", 0.07, 2, 0.94, 0.80),
    ("normal", 0.001, 10, 1.0, 1.0),
    ("normal", 0.15, 2.5, 0.98, 0.98),
    ("gumbel", 0.024, 6, 0.95, 1.0),
    ("t3", 0.024, 6, 0.96, 1.0),
    ("gumbel", 0.03, 3, 0.63, 1.0),
    ("exponential", 0.024, 6, 0.46, 1.0),
]
"""Bulk, share and factor of the planted tokens; mean precision and recall of the rule where it was proposed."""
SETS = range(12)
full_depth = pytest.mark.skipif(os.environ.get("VITREG_FULL_DEPTH") != "1", reason="long; set VITREG_FULL_DEPTH=1")


def plant(
    bulk: str, share: float = 0.0, times: float = 1.0, *, images: int = 256, seed: int = 0
) -> tuple[Tensor, np.ndarray]:
    """Norms of about 20, brighter in some images than in others, and which of them were multiplied."""
    rng = np.random.default_rng(seed)
    planted = rng.random((images, 196)) < share
    brightness = rng.normal(0, 0.2, (images, 1))
    logs = BULKS[bulk](rng, planted.shape) + brightness + np.log(times) * planted
    return torch.from_numpy(20 * np.exp(logs)), planted


def precision_recall(mask: Tensor, planted: np.ndarray) -> tuple[float, float]:
    hits = (mask.numpy() & planted).sum()
    return hits / mask.sum().item(), hits / planted.sum()


@pytest.mark.parametrize(
    ("bulk", "share", "times", "precision", "recall"),
    [
        ("normal", 0.024, 8, 0.995, 0.995),
        ("normal", 0.03, 3, 0.97, 0.96),
        ("normal", 0.07, 2, 0.88, 0.78),
        ("normal", 0.001, 10, 0.99, 0.99),
        ("normal", 0.15, 2.5, 0.96, 0.95),
        ("gumbel", 0.024, 6, 0.94, 0.99),
        ("t3", 0.024, 6, 0.94, 0.97),
        ("gumbel", 0.03, 3, 0.6, 0.99),
        ("exponential", 0.024, 6, 0.42, 0.99),
    ],
)
def test_planted_outliers_are_found(bulk: str, share: float, times: float, precision: float, recall: float) -> None:
    for seed in range(2):
        norms, planted = plant(bulk, share, times, seed=seed)
        outliers = find_outliers(norms)
        assert outliers.found
        assert outliers.rule == "mixture"
        measured = precision_recall(outliers.mask, planted)
        assert measured[0] >= precision
        assert measured[1] >= recall


@full_depth
@pytest.mark.parametrize(("bulk", "share", "times", "precision", "recall"), TABLE)
def test_twelve_sets_are_as_good_as_the_table_at_full_depth(
    bulk: str, share: float, times: float, precision: float, recall: float
) -> None:
    measured = []
    for seed in SETS:
        norms, planted = plant(bulk, share, times, seed=seed)
        outliers = find_outliers(norms)
        assert outliers.found
        measured.append(precision_recall(outliers.mask, planted))
    means = np.mean(measured, axis=0)
    print(f"\n{bulk}, {share:.1%} x{times}: precision {means[0]:.3f} ({precision}), recall {means[1]:.3f} ({recall})")  # noqa: T201
    assert means[0] >= precision - 0.05
    assert means[1] >= recall - 0.05


@full_depth
def test_outliers_behind_a_heavy_tail_are_found_in_most_sets_at_full_depth() -> None:
    """The table has 10 of 12 sets, precision .92 and recall .67, for a bulk whose width it does not say; ours is .08.

    At the width of `BULKS`, .115, no set is found: the tail reaches into the outliers.
    """
    measured = []
    for seed in SETS:
        rng = np.random.default_rng(seed)
        planted = rng.random((256, 196)) < 0.03
        logs = 0.08 * rng.standard_t(3, planted.shape) + np.log(3) * planted
        outliers = find_outliers(torch.from_numpy(20 * np.exp(logs)))
        if outliers.found:
            measured.append(precision_recall(outliers.mask, planted))
    means = np.mean(measured, axis=0)
    found = f"found in {len(measured)} of 12, precision {means[0]:.3f}, recall {means[1]:.3f}"
    print(f"\nt3 of width .08, 3.0% x3: {found}")  # noqa: T201
    assert len(measured) >= 10
    assert means[0] >= 0.92 - 0.05
    assert means[1] >= 0.67 - 0.05


@full_depth
@pytest.mark.parametrize("bulk", BULKS)
def test_twelve_sets_of_one_mode_give_no_false_alarm_at_full_depth(bulk: str) -> None:
    alarms = sum(find_outliers(plant(bulk, seed=100 + seed)[0]).found for seed in SETS)
    print(f"\n{bulk}: {alarms} false alarms in {len(SETS)} sets")  # noqa: T201
    assert alarms == 0


@pytest.mark.parametrize("bulk", BULKS)
@pytest.mark.parametrize("seed", range(2))
def test_one_mode_has_no_outliers(bulk: str, seed: int) -> None:
    outliers = find_outliers(plant(bulk, seed=100 + seed)[0])
    assert not outliers.found
    assert outliers.cutoff is None
    assert outliers.ratio is None
    assert outliers.separation is None
    assert not outliers.mask.any()
    assert outliers.fraction == outliers.image_fraction == 0
    assert outliers.evidence.valley > 0.6


@pytest.mark.parametrize("times", [1.4, 1.6])
def test_a_group_hidden_in_the_tail_is_not_a_mode(times: float) -> None:
    assert not any(find_outliers(plant("normal", 0.02, times, seed=seed)[0]).found for seed in range(2))


def test_statistics_describe_the_planted_groups() -> None:
    norms, planted = plant("normal", 0.03, 8)
    outliers = find_outliers(norms)
    logs = norms.numpy() / np.median(norms.numpy(), axis=1, keepdims=True)
    high, low = np.log(logs[planted]), np.log(logs[~planted])
    assert outliers.fraction == pytest.approx(planted.mean(), rel=0.01)
    assert outliers.image_fraction == pytest.approx(planted.any(axis=1).mean(), abs=0.01)
    assert outliers.ratio == pytest.approx(np.exp(high.mean() - low.mean()), rel=0.01)
    assert outliers.separation == pytest.approx(
        2**0.5 * (high.mean() - low.mean()) / np.hypot(high.std(), low.std()), rel=0.02
    )
    assert outliers.median_norm == pytest.approx(np.median(norms.numpy()))
    assert outliers.max_norm == norms.max().item()


@pytest.mark.parametrize("share", [0.0, 0.03])
def test_evidence_matches_closed_forms(share: float) -> None:
    norms, planted = plant("normal", share, 8)
    evidence = find_outliers(norms).evidence
    values = norms.numpy()
    count = 0
    for row in values:
        count += int((row > np.median(row) + 5 * np.median(np.abs(row - np.median(row)))).sum())
    assert evidence.mad5_count == count
    assert evidence.mad5_share == count / values.size
    assert evidence.percentile_98 == pytest.approx(np.quantile(values, 0.98))
    assert evidence.max_over_median == pytest.approx(values.max() / np.median(values))
    logs = np.log(values)
    scores = logs - np.median(logs, axis=1, keepdims=True)
    scores = (scores - scores.mean()) / scores.std()
    assert evidence.kurtosis == pytest.approx((scores**4).mean() - 3)
    assert (evidence.valley < 0.1) == planted.any()


def test_scaling_all_norms_or_one_image_changes_nothing() -> None:
    norms, _ = plant("gumbel", 0.03, 4)
    outliers = find_outliers(norms)
    scaled = find_outliers(1000 * norms)
    assert torch.equal(scaled.mask, outliers.mask)
    assert scaled.cutoff == pytest.approx(1000 * outliers.cutoff)
    brighter = find_outliers(norms * torch.linspace(0.2, 9, len(norms), dtype=norms.dtype)[:, None])
    assert torch.equal(brighter.mask, outliers.mask)
    assert brighter.fraction == outliers.fraction > 0


@pytest.mark.parametrize("images", [1, 256])
def test_cutoff_gives_the_mask_where_all_images_are_alike(images: int) -> None:
    norms, _ = plant("normal", 0.05, 8, images=images)
    norms = 20 * norms / torch.from_numpy(np.median(norms.numpy(), axis=1, keepdims=True))
    outliers = find_outliers(norms)
    assert outliers.found
    assert torch.equal(outliers.mask, norms > outliers.cutoff)


def test_the_same_norms_give_the_same_answer_in_half_the_precision() -> None:
    norms, _ = plant("normal", 0.03, 8)
    first, again, single = find_outliers(norms), find_outliers(norms), find_outliers(norms.float())
    assert torch.equal(first.mask, again.mask)
    assert first.cutoff == again.cutoff
    assert torch.equal(first.mask, single.mask)


@pytest.mark.parametrize(("images", "name"), [(15, "small-sample"), (16, "mixture")])
def test_too_few_images_use_the_small_sample_rule(images: int, name: str) -> None:
    norms, planted = plant("normal", 0.03, 8, images=images)
    outliers = find_outliers(norms)
    assert outliers.rule == name
    assert np.array_equal(outliers.mask.numpy(), planted)
    assert outliers.ratio == pytest.approx(8, rel=0.1)
    assert (outliers.separation is None) == (name == "small-sample")


def test_too_few_tokens_use_the_small_sample_rule() -> None:
    norms = plant("normal", images=64)[0]
    assert find_outliers(norms[:, :46]).rule == "small-sample"  # 2,944 tokens
    assert find_outliers(norms[:, :47]).rule == "mixture"  # 3,008


def test_small_sample_cut_is_five_lower_deviations_and_at_least_half_more() -> None:
    logs = np.linspace(-1, 1, 1001)
    logs[-1] = 6.0
    outliers = find_outliers(torch.from_numpy(np.exp(logs))[None])
    cut = 5 * (np.quantile(logs, 0.5) - np.quantile(logs, 0.159))
    assert outliers.cutoff == pytest.approx(np.exp(cut))
    assert outliers.mask.nonzero().tolist() == [[0, 1000]]
    steps = torch.tensor([1.0] * 50 + [1.49, 1.51])
    assert find_outliers(steps[None]).mask[0].nonzero().tolist() == [[51]]


def test_small_sample_has_no_outliers_in_one_mode() -> None:
    norms, _ = plant("normal", images=1)
    outliers = find_outliers(norms)
    assert not outliers.found
    assert outliers.cutoff is None


@pytest.mark.parametrize("images", [1, 64])
def test_equal_norms_have_no_outliers(images: int) -> None:
    outliers = find_outliers(torch.full((images, 196), 3.0))
    assert not outliers.found
    assert outliers.evidence.kurtosis == 0
    assert outliers.evidence.valley == 1


def test_a_few_stray_tokens_hide_no_mode() -> None:
    norms, planted = plant("normal", 0.02, 5)
    norms[0, :3] = torch.tensor([1e-6, 1e7, 1e9])
    outliers = find_outliers(norms)
    assert precision_recall(outliers.mask, planted) >= (0.99, 0.99)


@pytest.mark.parametrize(
    "field", [{"bic_gain": 1e6}, {"separation": 20.0}, {"ratio": 9.0}, {"share": (0.05, 0.5)}, {"count": 5000}]
)
def test_every_gate_can_refuse_a_mode(field: dict[str, float]) -> None:
    norms, _ = plant("normal", 0.03, 8)
    assert find_outliers(norms).found
    assert not find_outliers(norms, rule=OutlierRule(**field)).found


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_norms_are_counted_with_advice(bad: float) -> None:
    norms = torch.ones(20, 196)
    norms[3, 5] = norms[4, 6] = bad
    with pytest.raises(InputError, match=r"2 of 3920 patch norms are zero.*diverged.*float32 before the final norm"):
        find_outliers(norms)


def test_no_norms_ask_for_images() -> None:
    with pytest.raises(InputError, match=r"shape \(0, 196\).*give at least one image"):
        find_outliers(torch.ones(0, 196))


@pytest.mark.parametrize(("share", "times"), [(0.07, 2.5), (0.024, 8)])
def test_mixture_matches_scikit_learn(share: float, times: float) -> None:
    logs = np.log(plant("normal", share, times, images=48)[0].numpy())
    logs -= np.median(logs, axis=1, keepdims=True)
    samples = logs.reshape(-1, 1)
    one, two = (GaussianMixture(k, tol=1e-6, max_iter=500, random_state=0).fit(samples) for k in (1, 2))
    histogram = make_histogram(logs)
    fits = [expectation_maximisation(histogram, cuts, 1e-300) for cuts in ([], [0.6])]
    order = np.argsort(two.means_[:, 0])
    for ours in (fits[1], fit(histogram, starting_cuts(0.2)[0], OutlierRule())):
        np.testing.assert_allclose(ours.means, two.means_[order, 0], atol=0.01)
        np.testing.assert_allclose(ours.weights, two.weights_[order], atol=0.002)
        np.testing.assert_allclose(ours.stds, two.covariances_[order, 0, 0] ** 0.5, atol=0.01)
    assert fits[0].bic(samples.size) == pytest.approx(one.bic(samples), rel=1e-3)
    assert fits[1].bic(samples.size) == pytest.approx(two.bic(samples), rel=1e-3)


def test_one_mode_is_no_better_as_two_for_scikit_learn_either() -> None:
    logs = np.random.default_rng(0).normal(0, 0.2, (16, 196))
    one, two = (GaussianMixture(k, random_state=0).fit(logs.reshape(-1, 1)).bic(logs.reshape(-1, 1)) for k in (1, 2))
    histogram = make_histogram(logs)
    fits = [expectation_maximisation(histogram, cuts, 2e-4).bic(logs.size) for cuts in ([], [0.6], [0.0])]
    assert one < two
    assert fits[0] < min(fits[1:])


def test_components_come_in_order_even_where_the_fit_swaps_them() -> None:
    norms, _ = plant("t3", images=32, seed=1)
    histogram = make_histogram(np.log(norms.numpy()) - np.median(np.log(norms.numpy()), axis=1, keepdims=True))
    raw = expectation_maximisation(histogram, [0.41, 0.82], 2e-4)
    ordered = fit(histogram, [[0.41, 0.82]], OutlierRule())
    assert raw.means[2] < raw.means[1]
    assert ordered.means.tolist() == sorted(raw.means)
    assert ordered.moments() == pytest.approx(raw.moments())


@pytest.mark.parametrize(
    ("verdicts", "block"),
    [
        ([], None),
        ([True], None),
        ([False, False, False], None),
        ([False, True, True, True], 1),
        ([True, True], 0),
        ([False, True, False, True, True], 3),
        ([False, True, False, False], None),
        ([False, False, True], None),
        ([False, True, True, False], 1),
    ],
)
def test_emergence_is_the_first_of_two_positive_verdicts(verdicts: list[bool], block: int | None) -> None:
    assert emergence_block(verdicts) == block


class Doubling(Backbone):
    """A backbone whose residual stream is its pixels, doubled by every block; its final norm is told apart by a 0."""

    patch_size, embed_dim, depth, num_heads, num_registers, num_prefix_tokens = 1, 3, 4, 1, 0, 1
    prefix = ("cls",)
    device, preprocess = torch.device("cpu"), None

    def intermediate(
        self, images: Float[Tensor, "b 3 height width"], layers: Sequence[int], *, norm: bool = True
    ) -> list[Features]:
        tokens = images.flatten(2).transpose(1, 2)
        scales = [0 if norm else 2 ** (layer + 1) for layer in layers]
        registers = tokens[:, :0]
        rows, cols = images.shape[2:]
        return [Features(tokens[:, 0], registers, scale * tokens, (rows, cols)) for scale in scales]


def test_patch_norms_are_taken_after_every_block_before_the_final_norm() -> None:
    images = torch.randn(2, 3, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    norms = patch_norms(Doubling(), images)
    lengths = images.detach().float().square().sum(1).sqrt().flatten(1)
    assert norms.dtype == torch.float32
    assert not norms.requires_grad
    torch.testing.assert_close(norms, torch.stack([lengths * 2**block for block in (1, 2, 3, 4)]))
