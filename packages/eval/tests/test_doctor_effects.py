"""What a remedy is calibrated on, and which of two models the doctor calls the first."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vitreg_core import create_model
from vitreg_core.vit import VisionTransformer
from vitreg_eval import remedies
from vitreg_eval.config import DoctorOptions
from vitreg_eval.effects import run_both, time_ratio
from vitreg_eval.exam import Exam
from vitreg_eval.remedies import open_images
from vitreg_eval.results import read_result
from vitreg_eval.survey import survey


def model(source: str, seed: int) -> VisionTransformer:
    """A small random model that comes from `source`."""
    torch.manual_seed(seed)
    made = create_model("vit_ti8", image_size=32, depth=1, embed_dim=48).eval()
    made.source = source
    return made


def exam(source: str, options: DoctorOptions, folder: Path) -> Exam:
    """An exam of a model on the scenes of the options."""
    one = model(source, len(source))
    return Exam(source, one, survey(one, open_images(one, options), options, folder), options, 2)


def class_folders(folder: Path) -> Path:
    """Twelve images to learn from and eight to judge by, of each of three classes that differ a little in colour."""
    numbers = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8)):
        for label in range(3):
            (folder / split / str(label)).mkdir(parents=True)
            for index in range(count):
                pixels = numbers.integers(0, 200, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 4
                Image.fromarray(pixels).save(folder / split / str(label) / f"{index}.png")
    return folder


def test_the_model_before_is_the_first_of_a_comparison(tmp_path: Path) -> None:
    options = DoctorOptions(test_images=2, knn=class_folders(tmp_path / "classes"), remedy="denoise")
    before, after = (exam(name, options, tmp_path / name) for name in ("before", "after"))
    found = run_both("knn", {}, (before, after), options, tmp_path / "out")
    assert (found.first.model.source, found.other.model.source) == ("before", "after")
    written = {name: read_result(tmp_path / "out" / name / "result.json") for name in ("before", "after")}
    assert written["before"].model.source == "before"
    assert [one.method for one in found.differences] == ["paired"] * len(found.differences)
    for one in found.differences:
        values = {name: result.metrics[one.metric].value for name, result in written.items()}
        assert one.difference == pytest.approx(values["after"] - values["before"])
    assert any(abs(one.difference) > 0.01 for one in found.differences)


def test_the_ratio_of_times_is_that_of_the_slower_model_after(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, after = (exam(name, DoctorOptions(test_images=2), tmp_path / name) for name in ("before", "after"))
    quick = after.model.features
    images = [one.sample.images for one in (before, after)]
    assert torch.equal(*images)
    monkeypatch.setattr(after.model, "features", lambda images: (time.sleep(0.1), quick(images))[1])
    assert time_ratio(before, after) > 3


def test_calibration_and_report_share_no_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remedies, "CALIBRATION", 40)
    options = DoctorOptions(test_images=40, remedy="test-time")
    parts = ("calibration", "report", "all")
    drawn = {
        part: {image.numpy().tobytes() for batch in found.images.batches() for image in batch.images}
        for part, found in ((part, open_images(model("scenes", 0), options, part)) for part in parts)
    }
    assert [len(drawn[part]) for part in parts] == [40, 40, 40]
    assert not drawn["calibration"] & drawn["report"]
    assert drawn["report"] == drawn["all"]
