"""What the quickstart does: train, evaluate, draw, write the page."""

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stderr
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from quickstart import QuickstartOptions
from tqdm import tqdm
from vitreg_core import VisionTransformer, load_model
from vitreg_core.config import override
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.outliers import OutlierRule
from vitreg_core.planted import plant_register_neurons
from vitreg_core.provenance import commit, versions
from vitreg_core.test_time import with_test_time_registers
from vitreg_core.weights.files import weights_hash
from vitreg_eval import showcase
from vitreg_eval.config import DepthOptions, KnnOptions, LogregOptions, LostOptions, NormsOptions, SegmentOptions
from vitreg_eval.datasets import photo_folder, scenes
from vitreg_eval.diagnosis import diagnose, outlier_metrics
from vitreg_eval.extract import all_tokens, train_and_test
from vitreg_eval.metrics import Metric
from vitreg_eval.published import PAPER, WITHOUT_AND_WITH
from vitreg_eval.report import Page, Section, apart, comparison, settings_section, write_page
from vitreg_eval.results import table, write_json
from vitreg_eval.tasks import depth, knn, logreg, lost, norms, segment
from vitreg_recipes import TrainConfig, find, train

WITHOUT, WITH = "R = 0", "R = {}"
PLANTED, MENDED = "R = 0, planted artifact", "planted artifact + test-time register"
CALIBRATION_SEED = 77
CALIBRATION_SCENES = 256
HIGHER_IS_BETTER = ("linear top1", "knn top1", "segment miou", "lost corloc")
LOWER_IS_BETTER = ("depth rmse",)


def quickstart(options: QuickstartOptions) -> None:
    """Train, evaluate and write the page."""
    started = time.perf_counter()
    photos = load_photos(options)
    models = build_models(options)
    measured = {name: scene_norms(model, options) for name, model in models.items()}
    results = {name: evaluate(name, model, measured[name], options) for name, model in models.items()}
    sections = [*scene_sections(models, results, measured, options), *photo_sections(photos, options)]
    settings = everything(models, options, time.perf_counter() - started)
    lead = [LEAD, verdict(results, WITH.format(options.registers)), planted_verdict(results)]
    page = Page("What registers change", lead, [*sections, settings_section(settings)])
    plain = {name: {metric: m.model_dump() for metric, m in metrics.items()} for name, metrics in results.items()}
    write_json(options.out / "result.json", {"task": "quickstart", "metrics": plain, **settings})
    write_page(page, options.out / "report.html")
    for name, metrics in results.items():
        print(f"\n{name}\n{table(metrics)}")
    print("\n" + "\n".join(lead[1:]))
    print(f"report: {options.out / 'report.html'} ({time.perf_counter() - started:.0f} s)")


LEAD = (
    "A small vision transformer was trained twice on drawn scenes from the same seed: once without registers, once "
    "with. Both were frozen and measured. Two more columns show what an artifact does: it was planted by hand into "
    "the model without registers, and then moved to a test-time register."
)


def load_photos(options: QuickstartOptions) -> VisionTransformer | None:
    """The model for the part on photos, loaded first so that a wrong path fails at once."""
    if options.model is None or options.images is None:
        return None
    model = load_model(options.model)
    photo_folder(model.preprocess, options.images, options.limit, batch_size=32)
    return model


def build_models(options: QuickstartOptions) -> dict[str, VisionTransformer]:
    """The two trained models, and the first one with a planted artifact, before and after it is moved."""
    without, having = train_both(options)
    models = {WITHOUT: without, WITH.format(options.registers): having}
    base = models[WITHOUT]
    images = base.preprocess.normalize(
        draw_scenes(CALIBRATION_SCENES, (options.seed, CALIBRATION_SEED), image_size=64).image
    )
    models[PLANTED], neurons = plant_register_neurons(base, images, layer=base.depth // 2, share=0.03, factor=10.0)
    models[MENDED] = with_test_time_registers(models[PLANTED], neurons)
    return models


def train_both(options: QuickstartOptions) -> list[VisionTransformer]:
    """Train without and with registers side by side, or continue where an earlier quickstart stopped.

    Models this small gain little from a second thread, so each run has a process with one thread to itself.
    """
    runs = [run_config(registers, options) for registers in (0, options.registers)]
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        ended = [pool.submit(train_alone, run, shown=run is runs[-1]) for run in runs]
        for run in ended:
            run.result()
    return [load_model(str(run.out)) for run in runs]


def train_alone(config: TrainConfig, *, shown: bool) -> None:
    """Train in this process with one thread; one of the runs shows its progress for both."""
    torch.set_num_threads(1)
    assert config.out is not None
    with ExitStack() as stack:
        if not shown:
            stack.enter_context(redirect_stderr(stack.enter_context(Path(os.devnull).open("w"))))
        train(config, resume=(config.out / "run.json").exists())


def run_config(registers: int, options: QuickstartOptions) -> TrainConfig:
    """The run with this many registers."""
    changes: dict[str, Any] = {
        "model.registers": registers,
        "seed": options.seed,
        "out": options.out / f"r{registers}",
    }
    run = find("deit3_scenes")
    assert isinstance(run, TrainConfig)
    if options.steps is not None:
        changes |= {"steps": options.steps, "optim.warmup_steps": min(run.optim.warmup_steps, options.steps // 10)}
    return override(run, changes)


def evaluate(
    name: str, model: VisionTransformer, measured: norms.TokenNorms, options: QuickstartOptions
) -> dict[str, Metric]:
    """All tasks on one model; the probes share one extraction."""
    common: dict[str, Any] = {"seed": options.seed}
    sizes = {"train_images": options.train_images, "test_images": options.test_images}
    with tqdm(total=7, desc=f"evaluating {name}", disable=None, leave=False) as bar:
        train_set, test_set = train_and_test(model, KnnOptions(**common, **sizes), all_tokens(model))
        bar.update()
        tasks: tuple[tuple[str, Callable[[], dict[str, Metric]]], ...] = (
            ("linear", lambda: {"top1": logreg.evaluate(train_set, test_set, LogregOptions(**common))["top1"]}),
            ("knn", lambda: knn.evaluate(train_set, test_set, KnnOptions(**common))),
            (
                "segment",
                lambda: segment.evaluate(train_set, test_set, SegmentOptions(**common, steps=options.head_steps)),
            ),
            ("depth", lambda: depth.evaluate(train_set, test_set, DepthOptions(**common, steps=options.head_steps))),
            ("lost", lambda: evaluate_lost(model, options)),
            ("doctor", lambda: outlier_metrics(diagnose(measured.patches), options.seed)),
        )
        found: dict[str, Metric] = {}
        for task, measure in tasks:
            found |= {f"{task} {metric}": value for metric, value in measure().items()}
            bar.update()
    return found


def lost_options(options: QuickstartOptions) -> LostOptions:
    """LOST as the paper ran it for DeiT-III: on values."""
    return LostOptions(seed=options.seed, test_images=options.test_images, features="values")


def evaluate_lost(model: VisionTransformer, options: QuickstartOptions) -> dict[str, Metric]:
    """CorLoc on scenes."""
    settings = lost_options(options)
    found = lost.search(model, lost.open_photos(model, settings).photos, settings)
    return lost.evaluate(found, options.seed)


def scene_norms(model: VisionTransformer, options: QuickstartOptions) -> norms.TokenNorms:
    """Norms of all tokens on the test scenes."""
    settings = NormsOptions(seed=options.seed, test_images=options.test_images)
    return norms.token_norms(model, norms.open_images(model, settings), settings)


def scene_sections(
    models: Mapping[str, VisionTransformer],
    results: Mapping[str, Mapping[str, Metric]],
    measured: Mapping[str, norms.TokenNorms],
    options: QuickstartOptions,
) -> list[Section]:
    """Table and figures on scenes."""
    text = [
        f"{options.test_images} scenes that no model has seen; 95 % intervals by bootstrap over images. Probes and "
        f"heads were fitted on {options.train_images} other scenes. Accuracy is that of the main object's class.",
        f"The values of the paper ({PAPER}) are of other models on other data: compare directions, not values.",
        "LOST reads the values of the last block. A scene has 64 patches, fewer than LOST's 100 candidates, so every "
        "patch is one.",
        "The columns marked planted are a demonstration: two hidden units of one MLP were written by hand. They show "
        "that outliers are found and removed, not that training made them.",
    ]
    image_set = scenes(models[WITHOUT].preprocess, options.test_images, options.seed, "test")
    shown = showcase.exhibit(models, image_set, measured, lost_options(options))
    return [Section("Numbers", text, comparison(results, WITHOUT_AND_WITH)), *showcase.show(shown)]


def photo_sections(model: VisionTransformer | None, options: QuickstartOptions) -> list[Section]:
    """The same figures for real weights on real photos."""
    if model is None or options.images is None:
        return []
    image_set = photo_folder(model.preprocess, options.images, options.limit, batch_size=32)
    settings = NormsOptions(seed=options.seed, images=options.images, limit=options.limit)
    measured = norms.token_norms(model, image_set, settings)
    shown = showcase.exhibit({model.source: model}, image_set, {model.source: measured}, lost_options(options))
    found = outlier_metrics(diagnose(measured.patches), options.seed)
    about = f"{image_set.data.n} photos of {options.images}, weights {model.source}, nothing planted."
    numbers = Section("Photos: numbers", [about], comparison({model.source: found}, {}))
    sections = showcase.show(shown)
    return [numbers, *(Section(f"Photos: {s.title}", s.text, s.table, s.figures) for s in sections)]


def verdict(results: Mapping[str, Mapping[str, Metric]], with_registers: str) -> str:
    """What registers brought on scenes, by the intervals alone."""
    changed = differences(results[WITHOUT], results[with_registers])
    artifacts = [name for name in (WITHOUT, with_registers) if "doctor cutoff" in results[name]]
    where = f"the model {' and in the model '.join(artifacts)}" if artifacts else "neither trained model"
    modes = f"The rule finds outlier tokens in {where}."
    if not changed:
        return f"Registers brought nothing on scenes: no metric differs beyond its 95 % interval. {modes}"
    return f"With registers the model is {changed}, beyond the 95 % intervals (one seed). {modes}"


def planted_verdict(results: Mapping[str, Mapping[str, Metric]]) -> str:
    """What the planted artifact did, and what is left of it after it is moved."""
    harm, rest = (differences(results[WITHOUT], results[name]) for name in (PLANTED, MENDED))
    return (
        f"Against the model without registers, the planted artifact makes it {harm or 'no different in any metric'}; "
        f"with the artifact moved to a test-time register it is {rest or 'no different in any metric'}."
    )


def differences(first: Mapping[str, Metric], second: Mapping[str, Metric]) -> str:
    """In what the second model is better or worse than the first, beyond the intervals; empty where in nothing."""
    names: dict[str, list[str]] = {"better": [], "worse": []}
    for name in (*HIGHER_IS_BETTER, *LOWER_IS_BETTER):
        if apart(first[name], second[name]):
            better = (second[name].value > first[name].value) == (name in HIGHER_IS_BETTER)
            names["better" if better else "worse"].append(name)
    return " and ".join(f"{how} in {', '.join(which)}" for how, which in names.items() if which)


def everything(models: Mapping[str, VisionTransformer], options: QuickstartOptions, seconds: float) -> dict[str, Any]:
    """All that the page was made with."""
    return {
        "settings": options.model_dump(mode="json"),
        "tasks": {
            "lost": lost_options(options).model_dump(mode="json"),
            "knn": KnnOptions().model_dump(mode="json", include={"k", "temperature", "label"}),
            "linear": LogregOptions().model_dump(mode="json", include={"held_out", "float64", "passes"}),
            "doctor": OutlierRule().model_dump(mode="json"),
            "planted": {"scenes": CALIBRATION_SCENES, "seed": CALIBRATION_SEED, "share": 0.03, "factor": 10.0},
        },
        "training": [run_config(count, options).model_dump(mode="json") for count in (0, options.registers)],
        "models": {name: {"source": m.source, "hash": weights_hash(m)} for name, m in models.items()},
        "versions": versions(),
        "seed": options.seed,
        "commit": commit(),
        "seconds": round(seconds, 1),
    }
