"""The doctor on models and images of every kind, with planted answers where there is one to find."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vitreg_core import create_model
from vitreg_core.backbones import as_backbone
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError
from vitreg_core.planted import plant_register_neurons
from vitreg_core.register_neurons import RegisterNeurons
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights import load_model, save_model
from vitreg_eval import remedies
from vitreg_eval.cli import main
from vitreg_eval.config import DoctorOptions
from vitreg_eval.diagnosis import diagnose
from vitreg_eval.models import Model
from vitreg_eval.remedies import open_images
from vitreg_eval.results import Outcome
from vitreg_eval.tasks import doctor

SMALL = {"image_size": 64, "depth": 4, "embed_dim": 96, "layer_scale": 0.1}


def clean(**changes: object) -> VisionTransformer:
    """A small random model, whose patches differ by their positions."""
    torch.manual_seed(0)
    model = create_model("vit_ti8", **(SMALL | changes)).eval()
    with torch.no_grad():
        model.positions.patches.mul_(20)
    return model


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remedies, "CALIBRATION", 96)


@pytest.fixture(scope="module")
def planted() -> tuple[VisionTransformer, list]:
    """A model with register neurons in block 1."""
    model = clean(registers=2)
    return plant_register_neurons(model, model.preprocess.normalize(draw_scenes(96, 3).image), layer=1)


def examine(model: Model, out: Path, **options: object) -> tuple[Outcome, dict[str, Any]]:
    """What the doctor finds, and what it writes of the first model."""
    outcome = doctor.run(model, DoctorOptions(**{"test_images": 20} | options), out)
    found = json.loads((out / "findings.json").read_text())
    return outcome, next(iter(found.values()))


def test_what_was_planted_comes_back(planted: tuple[VisionTransformer, list], tmp_path: Path) -> None:
    model, neurons = planted
    outcome, found = examine(model, tmp_path, test_images=128)
    assert outcome.metrics["emergence_block"].value == 1
    assert [block["found"] for block in found["blocks"]] == [False, True, True, True]
    with torch.no_grad():
        images = model.preprocess.normalize(draw_scenes(64, (0, 2, 0, 0), image_size=64).image)
        norms = model.intermediate(images, [-1], norm=False)[0].patches.norm(dim=-1)
    cutoff = found["blocks"][-1]["cutoff"]
    shares = np.array(found["outlier_share_per_image"][:64])
    medians = norms.median(dim=1, keepdim=True).values
    typical = np.exp(np.median(np.log(found["blocks"][-1]["median_norm"])))
    by_hand = (norms / medians > cutoff / typical).double().mean(dim=1).numpy()
    assert np.abs(shares - by_hand).max() <= 2 / norms.shape[1]
    assert outcome.metrics["outlier_fraction"].value == pytest.approx(0.03, abs=0.015)
    named = {tuple(neuron) for neuron in found["evidence"]["neurons"]["neurons"]}
    assert tuple(neurons[0]) in named
    assert found["evidence"]["output_neighbours"]["outlier_median"] is not None
    assert found["evidence"]["replacement"]["kinds"][0]["patches"]["n"] == 64
    assert found["evidence"]["overlap"]["names"] == ["cls", "register 0", "register 1"]


def test_the_page_is_whole_and_alone(planted: tuple[VisionTransformer, list], tmp_path: Path) -> None:
    examine(planted[0], tmp_path)
    page = (tmp_path / "doctor.html").read_text()
    for heading in ("Where they are", "Since which block", "What writes them", "What they hold", "What to do"):
        assert heading in page
    assert "--remedy test-time" in page
    assert not {word for word in ("http://", "https://", "<script", "<link") if word in page}
    assert not (tmp_path / "survey").exists()


def test_a_clean_model_needs_nothing(tmp_path: Path) -> None:
    outcome, found = examine(clean(), tmp_path)
    assert outcome.metrics["outlier_fraction"].value == 0
    assert "cutoff" not in outcome.metrics
    assert found["verdict"].startswith("no outlier mode")
    assert "no outlier mode" in found["left_out"]["register neurons"]
    assert "Nothing:" in (tmp_path / "doctor.html").read_text()


def test_two_models_stand_side_by_side(planted: tuple[VisionTransformer, list], tmp_path: Path) -> None:
    save_model(clean(), tmp_path / "well")
    doctor.run(planted[0], DoctorOptions(test_images=20, compare=str(tmp_path / "well")), tmp_path / "out")
    first, second = json.loads((tmp_path / "out" / "findings.json").read_text()).values()
    assert first["metrics"]["outlier_fraction"]["value"] > 0
    assert second["metrics"]["outlier_fraction"]["value"] == 0
    assert (tmp_path / "out" / "doctor.html").read_text().count("no outlier mode in the norms") == 1


def foreign_timm() -> Model:
    timm = pytest.importorskip("timm")
    return as_backbone(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval())


def foreign_transformers() -> Model:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = transformers.Dinov2WithRegistersConfig(**size, image_size=56, patch_size=14, num_register_tokens=2)
    return as_backbone(transformers.Dinov2WithRegistersModel(config).eval(), PreprocessConfig(image_size=56))


def foreign_open_clip() -> Model:
    clip = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    return as_backbone(
        clip.CLIP(32, clip.CLIPVisionCfg(**vision), clip.CLIPTextCfg(**text)).eval(), PreprocessConfig(image_size=64)
    )


@pytest.mark.parametrize("build", [foreign_timm, foreign_transformers, foreign_open_clip])
def test_models_of_other_libraries_pass_unchanged(build: Callable[[], Model], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build()
    model.source = model.source or build.__name__
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcome, found = examine(model, tmp_path)
    assert outcome.data.n == 20
    assert found["evidence"]["linear"] is not None
    assert found["evidence"]["focus"] is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"class_token": False, "pool": "avg"}, "positional focus"),
        ({"depth": 1}, None),
    ],
)
def test_models_without_something_say_what_is_left_out(
    changes: dict[str, Any], left_out: str | None, tmp_path: Path
) -> None:
    _, found = examine(clean(**changes), tmp_path)
    page = (tmp_path / "doctor.html").read_text()
    assert left_out is None or (left_out in found["left_out"] and left_out in page)


def test_a_model_without_attention_maps_is_examined_without_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise InputError("this attention does not show its weights")

    model = clean()
    monkeypatch.setattr(model, "attention", refuse)
    outcome, found = examine(model, tmp_path)
    assert found["left_out"]["attention"] == "this attention does not show its weights"
    assert "does not show its weights" in (tmp_path / "doctor.html").read_text()
    assert outcome.metrics["median_norm"].value > 0


def photos(folder: Path, count: int) -> Path:
    """Photos of many sizes, one of them far from square."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for index in range(count):
        height, width = (40 + 13 * index, 400) if index == 1 else (50 + 7 * index, 80 - index)
        pixels = numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_few_photos_of_many_sizes_are_enough(tmp_path: Path) -> None:
    outcome, found = examine(clean(), tmp_path / "out", images=photos(tmp_path / "photos", 5))
    assert (outcome.data.n, found["images"]) == (5, 5)
    assert found["blocks"][-1]["rule"] == "small-sample"
    assert found["left_out"]["position probe"] == "a probe on 5 images; give 10 or more"


def test_unreadable_photos_are_named_and_left_out(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 5)
    (folder / "broken.png").write_bytes(b"no picture")
    outcome, found = examine(clean(), tmp_path / "out", images=folder)
    assert found["unreadable"] == ["broken.png"]
    assert found["images"] == 5
    assert outcome.metrics["max_norm"].n == 5
    assert "1 cannot be read and are left out, such as broken.png" in (tmp_path / "out" / "doctor.html").read_text()


@pytest.mark.parametrize("broken", [0, 2])
def test_no_photo_at_all_is_one_error(broken: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(broken):
        (folder / f"{index}.png").write_bytes(b"no picture")
    save_model(clean(), tmp_path / "model")
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--model", f"{tmp_path / 'model'}", "--images", f"{folder}", "--out", f"{tmp_path / 'out'}"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert ("none of the 2 images can be read, such as 0.png, 1.png" if broken else "0 images found") in lines[0]


def test_one_photo_is_enough_for_a_verdict(tmp_path: Path) -> None:
    outcome, found = examine(clean(), tmp_path / "out", images=photos(tmp_path / "photos", 1))
    assert outcome.metrics["outlier_images"].n == 1
    assert found["left_out"]


def test_a_model_of_wide_images_is_shown_square_ones(tmp_path: Path) -> None:
    model = clean(image_size=(64, 96))  # a grid of 8 x 12; photos are cropped to the longer side
    outcome, found = examine(model, tmp_path)
    assert outcome.data.n == 20
    assert np.shape(found["evidence"]["focus"]["maps"]) == (1, 12, 12)


def test_test_time_registers_are_shown_before_and_after(
    planted: tuple[VisionTransformer, list], tmp_path: Path
) -> None:
    options = DoctorOptions(test_images=64, remedy="test-time")
    outcome = doctor.run(planted[0], options, tmp_path)
    found = json.loads((tmp_path / "findings.json").read_text())
    assert found["before"]["metrics"]["outlier_fraction"]["value"] > 0.005
    assert found["after"]["metrics"]["outlier_fraction"]["value"] == 0
    assert found["effects"]["time_ratio"] > 0
    assert "96 other images" in found["effects"]["remedy"]
    shown = found["before"]["metrics"]["outlier_fraction"]["value"]
    assert outcome.metrics["outlier_fraction"].value == pytest.approx(shown, rel=1e-5)
    assert "Before and after" in (tmp_path / "doctor.html").read_text()


def test_a_clean_model_is_left_as_it_is(tmp_path: Path) -> None:
    outcome = doctor.run(clean(), DoctorOptions(test_images=20, remedy="test-time"), tmp_path)
    assert list(json.loads((tmp_path / "findings.json").read_text())) == ["vit_ti8"]
    assert any("nothing was changed" in note for note in outcome.notes)


def test_averaging_over_shifts_is_shown_before_and_after(tmp_path: Path) -> None:
    doctor.run(clean(), DoctorOptions(test_images=20, remedy="denoise"), tmp_path)
    found = json.loads((tmp_path / "findings.json").read_text())
    assert found["effects"]["time_ratio"] > 3
    assert "see the model before" in found["after"]["left_out"]["massive activations"]
    before, after = (found[name]["evidence"]["output_neighbours"]["normal_median"] for name in ("before", "after"))
    assert before != after


def test_calibration_and_report_share_no_photo(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 7)
    options = DoctorOptions(images=folder, remedy="test-time")
    halves = [set(open_images(clean(), options, part).names) for part in ("calibration", "report")]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == {f"{index}.png" for index in range(7)}


def test_tasks_are_run_on_both_models_and_compared_in_pairs(
    planted: tuple[VisionTransformer, list], tmp_path: Path
) -> None:
    numbers = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label in ("a", "b"):
            (tmp_path / "classes" / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "classes" / split / label / f"{index}.png")
    options = DoctorOptions(
        test_images=20, remedy="test-time", knn=tmp_path / "classes", classify=tmp_path / "classes" / "val"
    )
    doctor.run(planted[0], options, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "findings.json").read_text())["effects"]
    assert [one["first"]["task"] for one in found["tasks"]] == ["knn"]
    assert found["tasks"][0]["differences"][0]["method"] == "paired"
    assert "classify" in found["missing"]  # the model has no head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--remedy denoise --after x", "one second model is shown"),
        ("--knn x", "before and after what"),
        ("--remedy magic", "remedy"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--model", "vit_ti8", *options.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_random_neurons_mend_nothing(planted: tuple[VisionTransformer, list], tmp_path: Path) -> None:
    doctor.run(planted[0], DoctorOptions(test_images=64, remedy="random"), tmp_path)
    found = json.loads((tmp_path / "findings.json").read_text())
    before, after = (found[name]["metrics"]["outlier_fraction"]["value"] for name in ("before", "after"))
    assert after == pytest.approx(before, rel=0.2)
    assert found["effects"]["remedy"].startswith("a control: 2 neurons drawn at random")


def test_a_mode_that_the_input_has_already_emerges_in_no_block(tmp_path: Path) -> None:
    model = clean()
    with torch.no_grad():
        model.positions.patches[:2] *= 30
    outcome, found = examine(model, tmp_path, test_images=64)
    assert "so have the tokens that the first block reads" in found["verdict"]
    assert found["emergence_block"] is None
    assert "emergence_block" not in outcome.metrics


def test_a_mode_that_the_last_block_hides_is_judged_before_it() -> None:
    numbers = np.random.default_rng(0)
    norms = np.exp(0.1 * numbers.standard_normal((4, 64, 64)))
    norms[2, :, 3] *= 9
    norms[1, :, 3] *= 3
    found = diagnose(torch.from_numpy(norms).float())
    assert (found.block, found.emergence) == (2, 1)
    assert float(found.share.mean()) == pytest.approx(1 / 64)
    assert "these after block 2, none after the last" in found.verdict


@pytest.mark.parametrize("name", ["lost", "segment", "knn", "classify"])
def test_a_missing_folder_of_a_task_is_named_before_anything_runs(name: str, tmp_path: Path) -> None:
    options = DoctorOptions(model=("x",), remedy="denoise", **{name: tmp_path / "nowhere"})
    with pytest.raises(InputError, match=f"--{name} .*nowhere: no such folder"):
        options.needs()


def test_another_model_is_no_after(tmp_path: Path) -> None:
    save_model(clean(depth=3), tmp_path / "other")
    with pytest.raises(InputError, match="depth 3, and 4 before; show another model by --compare"):
        doctor.run(clean(), DoctorOptions(test_images=20, after=str(tmp_path / "other")), tmp_path / "out")


def test_the_mended_model_is_kept(planted: tuple[VisionTransformer, list], tmp_path: Path) -> None:
    options = DoctorOptions(test_images=20, remedy="test-time")
    second = doctor.open_second(planted[0], options)
    assert second.model is not None
    assert "the mended model is" in doctor.keep(second, tmp_path)[0]
    mended = load_model(tmp_path / "mended")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(mended(images).patches, second.model.features(images).patches)
    assert RegisterNeurons.load(tmp_path / "neurons.json") == second.neurons


def test_a_cutoff_of_ones_own_stands_beside_the_rule(planted: tuple[VisionTransformer, list], tmp_path: Path) -> None:
    examine(planted[0], tmp_path, cutoff=0.001)
    assert "above your cutoff 0.001: 100.00%" in (tmp_path / "doctor.html").read_text()
