"""The doctor: does a backbone have artifacts, where, since which block, what do they cost, what helps? One page."""

import shutil
from pathlib import Path
from typing import Any

from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights import save_model

from vitreg_eval import doctor_page, report
from vitreg_eval.config import DoctorOptions
from vitreg_eval.diagnosis import block_record, outlier_metrics
from vitreg_eval.effects import Effects, effects
from vitreg_eval.exam import ANALYSES, Exam, sample_size
from vitreg_eval.measuring import device
from vitreg_eval.metrics import Metric
from vitreg_eval.models import Model, open_model
from vitreg_eval.plain import plain
from vitreg_eval.remedies import Remedied, open_images, remedy
from vitreg_eval.results import Outcome, is_main_process, settings, write_json
from vitreg_eval.survey import survey

PAGE = "doctor.html"
SURVEY = "survey"
"""Folder for records where there is no cache; it goes when the page is there."""
NEURONS, MENDED = "neurons.json", "mended"
"""The register neurons that a remedy found, and the folder of the model that they were moved in."""
EFFECTS = "effects"
"""Folder for the results of the tasks before and after a remedy."""


def run(backbone: Model, options: DoctorOptions, out: Path) -> Outcome:
    """Examine a model, and a second one if asked; writes doctor.html and findings.json.

    Metrics: `outlier_fraction` of the patch tokens and `outlier_images` (share with at least one) after the last
    block, `median_norm`, `max_norm`, where there is an outlier mode `cutoff` and `emergence_block`; of the probes,
    where they could be fitted, `position_top1_<kind>`, `position_distance_<kind>`, `reconstruction_<kind>`; all of the
    first model.

    Raises:
        InputError: no images, or none that can be read; a second model that cannot be opened, or no remedy for it.
    """
    second = open_second(backbone, options)
    models = name_models(backbone, second.model, options)
    part = "all" if options.remedy in {None, "denoise"} else "report"
    found = {
        name: survey(model, open_images(model, options, part), options, out / SURVEY) for name, model in models.items()
    }
    data = next(iter(found.values())).images.images.data
    if not is_main_process():  # the other processes have read their share of the images
        return Outcome({}, data)
    count = min(sample_size(models[name], one) for name, one in found.items())
    exams = [Exam(name, models[name], one, options, count) for name, one in found.items()]
    for exam in exams:
        exam.gather()
    mended = len(exams) > 1 and options.compare is None
    changed = effects(exams[0], exams[1], options, out / EFFECTS) if mended else None
    metrics = [outlier_metrics(exam.diagnosis, options.seed) | probe_metrics(exam) for exam in exams]
    write_findings(exams, metrics, changed, second.told, out)
    kept = keep(second, out)
    made = doctor_page.page(exams, metrics, changed, second.told, options, settings(options))
    report.write_page(made, out / PAGE)
    shutil.rmtree(out / SURVEY, ignore_errors=True)
    return Outcome(metrics[0], data, [*made.lead, *notes(exams, changed), *kept, *where(out)])


def open_second(backbone: Model, options: DoctorOptions) -> Remedied:
    """The model that is shown beside the first, and what is to be said of it; none if nothing was asked for."""
    if options.remedy is not None:
        return remedy(backbone, options)
    source = options.compare or options.after
    if source is None:
        return Remedied(None, "")
    model = open_model(source).to(device(options))
    if options.after is not None:
        refuse_unlike(backbone, model, source)
    return Remedied(model, "")


def refuse_unlike(before: Model, after: Model, source: str) -> None:
    """Refuse a model that cannot be the first one after a remedy.

    Raises:
        InputError: names what differs.
    """
    for name in ("patch_size", "embed_dim", "depth"):
        here, there = getattr(before, name), getattr(after, name)
        if here != there:
            raise InputError(f"--after {source}: {name} {there}, and {here} before; show another model by --compare")
    here, there = before.preprocess.config.image_size, after.preprocess.config.image_size
    if here != there:
        raise InputError(f"--after {source}: reads {there} pixels, and {here} before; show another model by --compare")


def keep(second: Remedied, out: Path) -> list[str]:
    """Write the neurons that were found, and the model that they were moved in where our format holds it."""
    if second.neurons is None or second.model is None:
        return []
    second.neurons.save(out / NEURONS)
    if not isinstance(second.model, VisionTransformer):
        return [f"the neurons are in {out / NEURONS}"]
    save_model(second.model, out / MENDED)
    return [f"the mended model is {out / MENDED}, its neurons are in {out / NEURONS}"]


def name_models(first: Model, second: Model | None, options: DoctorOptions) -> dict[str, Model]:
    """What a reader calls the models: by where they come from, or before and after."""
    if second is None:
        return {name_of(first): first}
    if options.compare is None:
        return {"before": first, "after": second}
    names = [name_of(first), name_of(second)]
    return dict(zip(names if names[0] != names[1] else ("first", "second"), (first, second), strict=True))


def name_of(model: Model) -> str:
    """The last part of where a model comes from."""
    return Path(model.source).name or model.source


def probe_metrics(exam: Exam) -> dict[str, Metric]:
    """Numbers of the probes for result.json."""
    by_kind = {}
    if exam.position_probe is not None:
        by_kind = {"position_top1": exam.position_probe.top1, "position_distance": exam.position_probe.distance}
    if exam.linear is not None:
        by_kind["reconstruction"] = exam.linear.error
    pairs = ((f"{name}_{kind}", getattr(one, kind)) for name, one in by_kind.items() for kind in ("normal", "outlier"))
    return {name: mean.metric for name, mean in pairs if mean is not None}


def notes(exams: list[Exam], changed: Effects | None) -> list[str]:
    """What a terminal shows besides the numbers."""
    lines = [doctor_page.images_line(exams[0])]
    lines += [line for one in (changed.compared if changed else []) for line in one.text().splitlines()]
    lines += [f"left out: {line}" for line in doctor_page.left_out_lines(exams, changed)]
    return lines


def where(out: Path) -> list[str]:
    """Where the results are."""
    return [f"the page is {out / PAGE}, every number in {out / 'findings.json'}"]


def write_findings(
    exams: list[Exam], metrics: list[dict[str, Metric]], changed: Effects | None, told: str, out: Path
) -> None:
    """Every number of every model, and of the remedy."""
    found: dict[str, Any] = {one.name: findings(one, own) for one, own in zip(exams, metrics, strict=True)}
    if changed is not None:
        tasks = [one.record() for one in changed.compared]
        found["effects"] = {
            "remedy": told,
            "time_ratio": changed.time_ratio,
            "tasks": tasks,
            "missing": changed.missing,
        }
    write_json(out / "findings.json", found)


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
