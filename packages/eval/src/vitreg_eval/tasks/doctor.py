"""The doctor: does a backbone have artifacts, where, since which block, what do they cost, what helps? One page."""

import shutil
from pathlib import Path
from typing import Any

from vitreg_core.errors import InputError

from vitreg_eval import doctor_page, report
from vitreg_eval.config import DoctorOptions
from vitreg_eval.datasets import TolerantSet, scenes, tolerant_folder
from vitreg_eval.diagnosis import block_record, outlier_metrics
from vitreg_eval.exam import ANALYSES, Exam, sample_size
from vitreg_eval.measuring import device
from vitreg_eval.metrics import Metric
from vitreg_eval.models import Model, open_model
from vitreg_eval.plain import plain
from vitreg_eval.results import Outcome, is_main_process, settings, write_json
from vitreg_eval.survey import survey

PAGE = "doctor.html"
SURVEY = "survey"
"""Folder for records where there is no cache; it goes when the page is there."""


def run(backbone: Model, options: DoctorOptions, out: Path) -> Outcome:
    """Examine a model, and the ones that it is compared with; writes doctor.html and findings.json.

    Metrics: `outlier_fraction` of the patch tokens and `outlier_images` (share with at least one) after the last
    block, `median_norm`, `max_norm`, where there is an outlier mode `cutoff` and `emergence_block`; of the probes,
    where they could be fitted, `position_top1_<kind>`, `position_distance_<kind>`, `reconstruction_<kind>`; all of the
    first model.

    Raises:
        InputError: no images, or none that can be read; a model to compare with that cannot be opened.
    """
    models = {name_of(backbone): backbone} | others(options)
    found = {name: survey(model, open_images(model, options), options, out / SURVEY) for name, model in models.items()}
    if not is_main_process():  # the other processes have read their share of the images
        return Outcome({}, found[name_of(backbone)].images.images.data)
    count = min(sample_size(models[name], one) for name, one in found.items())
    exams = [Exam(name, models[name], one, options, count) for name, one in found.items()]
    for exam in exams:
        exam.gather()
    metrics = [outlier_metrics(exam.diagnosis, options.seed) | probe_metrics(exam) for exam in exams]
    write_json(out / "findings.json", {one.name: findings(one, own) for one, own in zip(exams, metrics, strict=True)})
    made = doctor_page.page(exams, metrics, options, settings(options))
    report.write_page(made, out / PAGE)
    shutil.rmtree(out / SURVEY, ignore_errors=True)
    notes = [*made.lead, doctor_page.images_line(exams[0])]
    notes += [f"{name}: left out: {why}" for name, why in (exams[0].survey.missing | exams[0].missing).items()]
    notes.append(f"the page is {out / PAGE}, every number in {out / 'findings.json'}")
    return Outcome(metrics[0], found[exams[0].name].images.images.data, notes)


def name_of(model: Model) -> str:
    """What a reader calls a model: the last part of where it comes from."""
    return Path(model.source).name or model.source


def others(options: DoctorOptions) -> dict[str, Model]:
    """The models to compare with, by name.

    Raises:
        InputError: one cannot be opened, or is the first one.
    """
    if options.compare is None:
        return {}
    model = open_model(options.compare).to(device(options))
    if name_of(model) in (Path(source).name for source in options.model):
        raise InputError(f"--compare {options.compare}: the same name as --model; give another model")
    return {name_of(model): model}


def open_images(model: Model, options: DoctorOptions) -> TolerantSet:
    """The photos of the options, or drawn scenes."""
    if options.images is None:
        return TolerantSet(scenes(model.preprocess, options.test_images, options.seed, "test"), [])
    return tolerant_folder(model.preprocess, options.images, options.limit, options.batch_size)


def probe_metrics(exam: Exam) -> dict[str, Metric]:
    """Numbers of the probes for result.json."""
    by_kind = {}
    if exam.position_probe is not None:
        by_kind = {"position_top1": exam.position_probe.top1, "position_distance": exam.position_probe.distance}
    if exam.linear is not None:
        by_kind["reconstruction"] = exam.linear.error
    pairs = ((f"{name}_{kind}", getattr(one, kind)) for name, one in by_kind.items() for kind in ("normal", "outlier"))
    return {name: mean.metric for name, mean in pairs if mean is not None}


def findings(exam: Exam, metrics: dict[str, Metric]) -> dict[str, Any]:
    """Every number of an exam, as plain values."""
    return {
        "source": exam.model.source,
        "verdict": exam.diagnosis.verdict,
        "metrics": plain(metrics),
        "emergence_block": exam.diagnosis.emergence,
        "blocks": [block_record(index, block) for index, block in enumerate(exam.diagnosis.blocks)],
        "outlier_share_per_image": plain(exam.diagnosis.share),
        "images": len(exam.survey),
        "unreadable": exam.survey.unreadable,
        "evidence": {name: plain(getattr(exam, name)) for name in ANALYSES},
        "left_out": exam.survey.missing | exam.missing,
    }
