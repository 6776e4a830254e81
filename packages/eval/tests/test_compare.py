import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from vitreg_core.errors import InputError
from vitreg_eval.cli import main
from vitreg_eval.compare import Z95, compare, difference
from vitreg_eval.metrics import Metric, measure
from vitreg_eval.results import RESAMPLES, DataRecord, ModelRecord, Result, read_result, write_result

DATA = DataRecord(name="photos", split="val", n=200, hash="a" * 64)


def make(metrics: dict[str, Metric], **changes: object) -> Result:
    values = {
        "task": "knn",
        "model": ModelRecord(source="m", hash="0" * 64),
        "data": DATA,
        "settings": {"k": 20, "device": "cpu"},
        "metrics": metrics,
        "versions": {"torch": "2"},
        "seed": 0,
        "commit": None,
        "seconds": 1.0,
    }
    return Result(**(values | changes))


def right(seed: int, n: int = 200, share: float = 0.7) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share


def test_pairs_agree_with_scipy() -> None:
    first = right(0)
    other = first | right(1, share=0.1)
    row = difference("top1", measure(first), measure(other), same_images=True)
    theirs = stats.bootstrap(
        (first.double().numpy(), other.double().numpy()),
        lambda a, b, axis: (b - a).mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert row.method == "paired"
    assert row.ci95 == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert row.difference == pytest.approx(float((other.double() - first.double()).mean()))


def test_unpaired_intervals_agree_with_the_closed_form() -> None:
    deviations = (0.03, 0.04)
    metrics = [
        Metric(value=value, n=200, ci95=(value - Z95 * deviation, value + Z95 * deviation))
        for value, deviation in zip((0.5, 0.6), deviations, strict=True)
    ]
    row = difference("top1", *metrics, same_images=True)
    assert row.method == "unpaired"
    assert row.ci95 == pytest.approx((0.1 - Z95 * 0.05, 0.1 + Z95 * 0.05))
    assert row.verdict == "beyond noise"


@pytest.mark.parametrize("same_images", [True, False])
def test_equal_models_stand_out_about_one_time_in_twenty(*, same_images: bool) -> None:
    trials, n = 400, 150
    generator = torch.Generator().manual_seed(5)
    found = 0
    for _ in range(trials):
        hard = torch.rand(n, generator=generator) * same_images  # what both find hard; without, they share no image
        scores = [measure(hard + torch.rand(n, generator=generator), repeats=300) for _ in range(2)]
        row = difference("score", scores[0], scores[1], same_images=same_images)
        assert row.method == ("paired" if same_images else "unpaired")
        found += row.verdict == "beyond noise"
    assert stats.binomtest(found, trials, 0.05).pvalue > 1e-3
    assert found > 0


def test_pairs_see_what_two_intervals_hide() -> None:
    hard = right(0, share=0.5).double()
    first, other = measure(hard), measure(hard * 0.98 + 0.02)
    assert difference("score", first, other, same_images=True).verdict == "beyond noise"
    assert difference("score", first, other, same_images=False).verdict == "within noise"


def test_a_metric_without_an_interval_has_no_verdict() -> None:
    row = difference("cutoff", Metric(value=1, n=9), Metric(value=2, n=9), same_images=True)
    assert (row.ci95, row.method, row.verdict) == (None, "none", "no interval")


def test_few_or_equal_images_give_no_verdict() -> None:
    few = [measure(right(seed, n=10)) for seed in (0, 1)]
    assert difference("top1", *few, same_images=True).verdict == "too few images"
    none, some = measure(torch.zeros(30)), measure(right(0))
    assert difference("top1", none, some, same_images=False).verdict == "no interval"
    assert difference("top1", none, none, same_images=True).verdict == "within noise"


def test_results_come_back_with_their_resamples(tmp_path: Path) -> None:
    found = make({"top1": measure(right(0)), "cutoff": Metric(value=2.0, n=200, note="by the rule")})
    write_result(tmp_path, found)
    assert read_result(tmp_path) == read_result(tmp_path / "result.json") == found
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["cutoff"] == {
        "value": 2.0,
        "n": 200,
        "ci95": None,
        "note": "by the rule",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [RESAMPLES, "result.json"]


def test_resamples_of_another_result_are_not_used(tmp_path: Path) -> None:
    write_result(tmp_path / "a", make({"top1": measure(right(0))}))
    write_result(tmp_path / "b", make({"top1": measure(right(1))}))
    (tmp_path / "a" / RESAMPLES).replace(tmp_path / "b" / RESAMPLES)
    assert read_result(tmp_path / "b").metrics["top1"].resamples == ()
    (tmp_path / "b" / RESAMPLES).write_bytes(b"\x00" * 20)
    assert read_result(tmp_path / "b").metrics["top1"].resamples == ()


def test_what_differs_is_named() -> None:
    first = make({"top1": measure(right(0)), "old": Metric(value=1, n=1)})
    other = make(
        {"top1": measure(right(1))},
        data=DATA.model_copy(update={"hash": "b" * 64, "n": 300}),
        settings={"k": 10, "device": "cuda"},
        versions={"torch": "3"},
        seed=1,
    )
    notes = "\n".join(compare(first, other).notes)
    for words in (
        "different data: A on photos val (200 images, aaaaaaaa), B on photos val (300 images, bbbbbbbb)",
        "different seeds: 0 and 1",
        "different settings: k 20 and 10",
        "different versions: torch 2 and 3",
        "old only in A",
        "the same model",
        "as if independent",
        "without a correction for their number",
    ):
        assert words in notes
    assert "device" not in notes


def test_batches_that_heads_train_on_are_a_setting() -> None:
    for task, said in (("knn", False), ("segment", True)):
        first, other = (make({"miou": measure(right(0))}, task=task, settings={"batch_size": n}) for n in (16, 64))
        assert ("different settings: batch_size 16 and 64" in compare(first, other).notes) is said


def test_the_command_prints_a_table_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = right(0)
    for name, values in (("a", first), ("b", first | right(1, share=0.5)), ("c", first)):
        model = ModelRecord(source=name, hash=name * 64)
        write_result(tmp_path / name, make({"top1": measure(values)}, model=model))
    main(["compare", *(str(tmp_path / name) for name in "abc"), "--out", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert "beyond noise" in printed.split("A: a")[1]
    assert "within noise" in printed.split("A: a")[2]
    written = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert [one["differences"][0]["verdict"] for one in written] == ["beyond noise", "within noise"]
    assert written[0]["differences"][0]["method"] == "paired"


BAD = {
    "one": (["a"], "missing: two or more results"),
    "none": (["a", "nowhere"], "nowhere: cannot be read (No such file or directory); give a result.json"),
    "json": (["a", "torn.json"], "torn.json: not the result of a task (the file: Invalid JSON"),
    "foreign": (["a", "foreign.json"], "foreign.json: not the result of a task (model: "),
    "more": (["a", "more.json"], "(extra: Extra inputs are not permitted)"),
    "number": (["a", "number.json"], "(metrics.top1.value: Input should be a finite number)"),
    "task": (["a", "task.json"], "knn of m with lost of m: their numbers mean different things"),
    "metric": (["a", "metric.json"], "no metric in common (top1 and top5)"),
    "empty": (["empty.json", "empty.json"], "embed gives no numbers to compare; give results of a task that measures"),
    "deep": (["a", "deep.json"], "deep.json: not the result of a task"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_results_end_with_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_result(Path("a"), make({"top1": measure(right(0))}))
    good = Path("a/result.json").read_text()
    Path("torn.json").write_text(good[:200])
    Path("foreign.json").write_text('{"task": "quickstart", "metrics": {}}')
    Path("more.json").write_text(json.dumps(json.loads(good) | {"extra": 1}))
    Path("task.json").write_text(json.dumps(json.loads(good) | {"task": "lost"}))
    Path("empty.json").write_text(json.dumps(json.loads(good) | {"task": "embed", "metrics": {}}))
    Path("metric.json").write_text(good.replace("top1", "top5"))
    metric = json.loads(good)["metrics"]["top1"] | {"value": float("nan")}
    Path("number.json").write_text(json.dumps(json.loads(good) | {"metrics": {"top1": metric}}))
    Path("deep.json").write_text("[" * 100000)
    names, advice = BAD[case]
    with pytest.raises(SystemExit) as ended:
        main(["compare", *names, "--out", "out.json"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert advice in error
    assert not Path("out.json").exists()


def test_a_result_of_many_bytes_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(InputError, match="too many for a result"):
        read_result(tmp_path / "big.json")
