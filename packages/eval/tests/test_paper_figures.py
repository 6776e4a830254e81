"""Every figure of the paper and the study on tiny models and drawn scenes, from one look at them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vitreg_core import VisionTransformer, ViTConfig, load_model, save_model
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError
from vitreg_core.planted import plant_register_neurons
from vitreg_core.provenance import versions
from vitreg_core.weights.files import weights_hash
from vitreg_eval.cli import main
from vitreg_eval.config.paper import FIGURES, NAMES, TABLES, PaperOptions
from vitreg_eval.datasets import scenes
from vitreg_eval.figures import given
from vitreg_eval.figures.given import names_of
from vitreg_eval.figures.plans import PLANS
from vitreg_eval.figures.snapshots import find_trainings
from vitreg_eval.metrics import Metric
from vitreg_eval.published import PAPER_TABLES
from vitreg_eval.published_figures import PUBLISHED
from vitreg_eval.results import DataRecord, ModelRecord, Result, write_result

IMAGES = 24
CUTOFF = 4.3


def small(seed: int, registers: int = 0, *, scale: float = 1.0) -> VisionTransformer:
    torch.manual_seed(seed)
    config = ViTConfig(image_size=48, patch_size=8, embed_dim=48, depth=2, num_heads=3, registers=registers)
    model = VisionTransformer(config).eval()
    with torch.no_grad():
        model.positions.patches.mul_(20 * scale)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted model without registers, a run with some and three snapshots, and results of earlier tasks."""
    place = tmp_path_factory.mktemp("paper")
    plain = small(0)
    pixels = plain.preprocess.normalize(draw_scenes(96, 3, image_size=48).image)
    save_model(plant_register_neurons(plain, pixels, layer=0)[0], place / "planted")
    for step in (90, 600, 1000):
        save_model(small(step, 3, scale=step / 500), place / "run" / "snapshots" / f"step_{step}")
    save_model(small(1000, 3, scale=2), place / "run")
    (place / "run" / "run.json").write_text('{"steps": 2000}')
    for index, name in enumerate(("planted", "run")):
        write_earlier(place / f"knn{index}", load_model(place / name), {"top1": 0.5 + 0.1 * index})
    return place


def write_earlier(place: Path, model: VisionTransformer, values: dict[str, float], source: str = "") -> None:
    """The result of an earlier run."""
    found = Result(
        task="knn",
        model=ModelRecord(source=source or model.source, hash=weights_hash(model)),
        data=DataRecord(name="imagenette", split="val", n=40, hash=""),
        settings={},
        metrics={name: Metric(value=value, n=40, ci95=(value - 0.1, value + 0.1)) for name, value in values.items()},
        versions={},
        seed=0,
        commit=None,
        seconds=1.0,
    )
    write_result(place, found)


def run(out: Path, which: str, *words: object) -> None:
    main(list(map(str, ("paper", which, "--out", out, "--device", "cpu", "--test_images", IMAGES, *words))))


def models(folder: Path, *names: str) -> list[object]:
    return [word for name in names for word in ("--model", folder / name)]


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """Everything at once."""
    results = ["--results", folder / "knn0", folder / "knn1"]
    run(folder / "all", "all", *models(folder, "planted", "run"), "--cutoff", CUTOFF, "--hours", 10, *results)
    return folder / "all"


def record(made: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made / name / "figure.json").read_text())
    return found


def arrays(made: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made / name / "arrays.json").read_text())
    return found


def test_every_name_has_a_line_a_plan_and_what_is_published() -> None:
    assert FIGURES.keys() == PLANS.keys() == PUBLISHED.keys()
    assert TABLES.keys() == PAPER_TABLES.keys()
    assert {f"fig{n}" for n in ("1", "2", "3", "4a", "4b", "4c", "5a", "5b", *range(6, 17))} < NAMES.keys()
    assert {f"study_fig{n}" for n in (1, 4, 5, 6, 7, 8, 9, 10, 11)} < NAMES.keys()


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "fig6"])
def test_every_figure_is_whole(name: str, made: Path, folder: Path) -> None:
    pictures = sorted((made / name).glob("*.png"))
    assert pictures
    for path in pictures:
        shown = np.asarray(Image.open(path).convert("RGB"))
        assert shown.std() > 5
    page = (made / name / "figure.html").read_text()
    assert PUBLISHED[name].choice.replace("'", "&#39;").replace(">", "&gt;") in page
    assert page.count("data:image/png") == len(pictures)
    assert "published (other weights and images)" in page
    assert arrays(made, name)
    found = record(made, name)
    assert found["published"] == [vars(one) for one in PUBLISHED[name].published]
    assert found["seed"] == 0
    assert found["versions"] == versions()
    if name not in ("fig12", "study_carbon", "fig4b", "study_fig9", "study_fig11"):
        assert found["models"]["run"]["hash"] == weights_hash(load_model(folder / "run"))


def test_what_is_missing_is_listed(made: Path) -> None:
    page = (made / "index.html").read_text()
    assert "a drawing of where registers join the sequence" in page
    assert page.count("give --data DIR") == len(TABLES)
    assert record(made, "fig9")["missing"] == {"planted": "a model without registers"}
    assert "no outlier mode" in record(made, "fig10")["missing"]["run"]
    assert not (made / "survey").exists()


def norms_by_hand(folder: Path, name: str) -> torch.Tensor:
    model = load_model(folder / name)
    batch = next(scenes(model.preprocess, IMAGES, 0, "test").batches()).images
    with torch.no_grad():
        return model.intermediate(batch, [-1], norm=False)[0].patches.norm(dim=-1)


def test_shares_of_outliers_are_those_of_the_tokens(made: Path, folder: Path) -> None:
    norms = norms_by_hand(folder, "planted")
    found = record(made, "fig3")["metrics"]["planted"]
    assert found["fraction_above_4.3"]["value"] == pytest.approx(float((norms > CUTOFF).double().mean()))
    share = float((norms > found["cutoff"]["value"]).double().mean())
    assert 0 < share == pytest.approx(found["outlier_fraction"]["value"], abs=0.01)
    shown = arrays(made, "fig10")["positions"]["planted, norm > 4.3"]
    np.testing.assert_allclose(np.ravel(shown["share"]), (norms > CUTOFF).double().mean(dim=0), rtol=1e-5)
    counts = np.array(arrays(made, "study_fig4")["norms"]["planted"]["counts"])
    assert counts.sum() == norms.numel()
    assert record(made, "fig4a")["metrics"]["planted"]["emergence_block"]["value"] == 0


def test_attention_at_twice_the_size_is_that_of_the_model(made: Path, folder: Path) -> None:
    shown = arrays(made, "fig1")
    model = load_model(folder / "run")
    row = int(shown["images"][0].removeprefix("scene "))
    drawn = draw_scenes(IMAGES, (0, 2, 0, 0), image_size=96).image[row : row + 1]
    with torch.no_grad():
        weights = model.attention(model.preprocess.normalize(drawn), -1).mean(dim=1)[0, 0, 4:]
    np.testing.assert_allclose(np.ravel(shown["attention"]["run"][0]), weights / weights.sum(), rtol=1e-4)


def test_likeness_of_registers_is_the_mean_cosine_of_their_maps(made: Path, folder: Path) -> None:
    curve = arrays(made, "study_fig11")["curves"]["run"]
    assert curve["progress"] == [0.045, 0.3, 0.5]
    model = load_model(folder / "run" / "snapshots" / "step_600")
    batch = next(scenes(model.preprocess, IMAGES, 0, "test").batches()).images
    with torch.no_grad():
        maps = model.attention(batch, -1).mean(dim=1)[:, 1:4, 4:]
    pairs = [torch.cosine_similarity(maps[:, a], maps[:, b], dim=-1).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert curve["cosine"][1] == pytest.approx(float(sum(pairs)) / 3, abs=1e-4)


def test_norms_over_training_are_those_of_each_snapshot(made: Path, folder: Path) -> None:
    history = arrays(made, "fig4b")["run"]
    assert history["steps"] == [90, 600, 1000]
    for name, one in zip(("step_90", "step_600", "step_1000"), history["checkpoints"], strict=True):
        norms = norms_by_hand(folder, f"run/snapshots/{name}")
        assert one["quantiles"][3] == pytest.approx(float(norms.quantile(0.5)), rel=1e-4)
    records = record(made, "fig4b")["models"]
    assert list(records) == ["run, step 90", "run, step 600", "run, step 1000"]


def test_golden_numbers_of_the_reference(made: Path) -> None:
    stripes = arrays(made, "fig11")["no antialias"]["column_sums"]
    golden = [2.385, 5.365, -0.349, 6.923, -1.018, 6.363, 0.865, 3.967]
    np.testing.assert_allclose(stripes, [*golden, *golden[::-1]], atol=6e-4)
    growth = record(made, "fig12")["metrics"]["ViT-L/14 (paper)"]
    assert growth["flops_growth_reg4"]["value"] == pytest.approx(0.0162, abs=5e-5)
    assert growth["flops_growth_reg16"]["value"] == pytest.approx(0.0648, abs=5e-5)
    carbon = record(made, "study_carbon")["metrics"]
    assert carbon["study, multiplied out"]["kwh"]["value"] == pytest.approx(633.6)
    assert carbon["yours"]["kg"]["value"] == pytest.approx(10 * 0.4 * 1.2 * 0.385)


def test_curves_come_from_earlier_results(made: Path, folder: Path, tmp_path: Path) -> None:
    numbers = record(made, "fig8")["metrics"]["earlier results"]
    assert {name: one["value"] for name, one in numbers.items()} == {
        "knn top1 on imagenette, 0 registers": 0.5,
        "knn top1 on imagenette, 3 registers": 0.6,
    }
    write_earlier(tmp_path / "counts", small(5), {"top1_reg0": 0.3, "top1_reg2": 0.4, "top1_auto": 0.4})
    write_earlier(tmp_path / "first", small(5), {"top1": 0.35}, "elastic, 1 registers")
    write_earlier(tmp_path / "stranger", small(6), {"top1": 0.9})
    results = ["--results", *(tmp_path / name for name in ("counts", "first", "stranger"))]
    run(tmp_path / "out", "fig8", *models(folder, "run"), *results)
    found = json.loads((tmp_path / "out" / "figure.json").read_text())
    assert [one["value"] for one in found["metrics"]["earlier results"].values()] == [0.3, 0.35, 0.4]
    assert "none of --model" in found["missing"][str(tmp_path / "stranger")]
    assert found["missing"]["other numbers of registers"]


def test_figures_without_models_are_made_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITREG_DATA", raising=False)
    run(tmp_path, "all")
    said = capsys.readouterr().out
    assert sorted(path.parent.name for path in tmp_path.glob("*/figure.html")) == ["fig11", "fig12", "study_carbon"]
    assert "fig3: left out: no model is given; give --model SOURCE" in said
    assert f"3 of {len(FIGURES) + len(TABLES)} figures and tables made" in said


def test_snapshots_alone_suffice(folder: Path, tmp_path: Path) -> None:
    steps = [folder / "run" / "snapshots" / f"step_{step}" for step in (600, 90)]
    run(tmp_path, "study_fig8", "--snapshots", *steps)
    found = json.loads((tmp_path / "figure.json").read_text())
    assert list(found["models"]) == ["run, step 90", "run, step 600"]
    assert found["missing"] == {"norms after every block": "no model is given; give --model SOURCE"}


def test_images_that_cannot_be_read_are_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for index in range(17):
        pixels = np.random.default_rng(index).integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index:02}.png")
    (tmp_path / "photos" / "05.png").write_text("no picture")
    run(tmp_path / "out", "fig2", *models(folder, "run"), "--images", tmp_path / "photos")
    found = json.loads((tmp_path / "out" / "figure.json").read_text())
    assert found["missing"]["images"] == "1 cannot be read, such as 05.png"
    assert found["metrics"]["run"]["peakiness"]["n"] == 16


BAD = {
    "no registers": ("fig9", ("planted",), "fig9: planted: a model without registers"),
    "no snapshots": ("fig4b", ("planted",), "fig4b: two or more snapshots of a training are needed, and no --model is"),
    "a drawing": ("fig6", (), "fig6: a drawing of where registers join the sequence"),
    "no pairs": ("study_fig11", ("planted",), "two or more snapshots of a training are needed"),
}


@pytest.mark.parametrize("case", BAD)
def test_nothing_made_is_one_line(case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    which, names, advice = BAD[case]
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, which, *models(folder, *names))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert advice in said
    assert said.count("\n") == 1


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert set(NAMES) <= set(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as ended:
        main(["paper", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +{re.escape(line)}$", said, re.MULTILINE) for name, line in NAMES.items())


def test_what_fails_once_is_not_tried_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def survey(*arguments: object) -> None:
        tried.append(arguments)
        raise InputError("norms are not finite")

    monkeypatch.setattr(given, "survey", survey)
    asked = given.Given(PaperOptions(which="all", model=(str(folder / "planted"),), device="cpu"), tmp_path)
    for _ in range(2):
        with pytest.raises(InputError, match="norms are not finite"):
            _ = asked.exams
    assert len(tried) == 1
    assert list(asked.models) == ["planted"]


def empty_model(place: Path) -> Path:
    place.mkdir(parents=True)
    (place / "model.safetensors").touch()
    return place


def test_snapshots_of_a_run_are_found_by_step(tmp_path: Path) -> None:
    run = tmp_path / "r"
    for part, step in (("checkpoints", 3000), ("checkpoints", 200), ("snapshots", 200), ("snapshots", 1000)):
        empty_model(run / part / f"step_{step:06}")
    empty_model(run / "snapshots" / "step_001000" / "ema")
    (run / "snapshots" / ".step_000005.tmp").mkdir()
    (run / "snapshots" / "step_000007").mkdir()
    (run / "run.json").write_text('{"steps": 4000}')
    [found] = find_trainings([str(run), "vit_ti16"], ())
    assert (found.name, found.steps) == ("r", 4000)
    places = [(one.step, one.folder.relative_to(run).as_posix()) for one in found.snapshots]
    first, last = (200, "snapshots/step_000200"), (3000, "checkpoints/step_003000")
    assert places == [first, (1000, "snapshots/step_001000/ema"), last]
    (run / "run.json").write_text("{")
    assert find_trainings([str(run)], ())[0].steps == 3000


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (("step_1",), "one shows no change"),
        (("step_1", "other"), "no step in its name"),
        (("step_1", "a/step_01"), "both of step 1"),
    ],
)
def test_snapshots_that_show_no_change_are_refused(names: Sequence[str], advice: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=advice):
        find_trainings([], [empty_model(tmp_path / name) for name in names])


def test_models_of_one_name_are_told_apart() -> None:
    assert names_of(["a/run", "b/run", "c/other"]) == ["a/run", "b/run", "other"]
    assert names_of(["a/run", "a/run"]) == ["a/run (0)", "a/run (1)"]


def test_published_values_are_those_of_the_papers(shared_data: Path) -> None:
    reference = shared_data.parent / "reference"
    facts = (reference / "registers_analysis.md").read_text()
    texts = {part: (reference / "papers" / name).read_text() for part, name in PAPERS.items()}
    for part, numbers in SPOKEN.items():
        for word in numbers:
            assert word in texts[part] or word in facts, word
    values = {one.value for figure in PUBLISHED.values() for one in figure.published if isinstance(one.value, float)}
    spoken = {float(word.strip("%")) for words in SPOKEN.values() for word in words}
    alike = [value for value in values if not any(np.isclose(value * scale, list(spoken)).any() for scale in (1, 100))]
    assert set(alike) == {10.0, 15.0, 0.375, 0.333, 0.2, 0.02, 0.06, 1.471, 580.0}


PAPERS = {"paper": "registers_paper.txt", "study": "small_vits_reproduction.txt"}
SPOKEN = {
    "paper": ("2.37", "41.7", "22.8", "0.79", "5.09", "18.38", "25.23", "84.3", "84.8", "46.6", "47.9", ".378", ".366"),
    "study": ("120.02", "176.54", "63.85", "0.995", "0.929", "256.4"),
}


def test_options_know_what_a_figure_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITREG_DATA", raising=False)
    assert PaperOptions(which="fig3").needs() == ["--model SOURCE"]
    assert PaperOptions(which="fig4b", snapshots=(Path("a"),)).needs() == []
    assert PaperOptions(which="fig12").needs() == []
    assert PaperOptions(which="all").needs() == []
