"""Advice: every command is read by the program that it names, and the Python runs as it is printed."""

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from vitreg_core import create_model, load_model, save_model
from vitreg_core.backbones import as_backbone
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.options import parse_options
from vitreg_core.planted import plant_register_neurons
from vitreg_core.register_neurons import RegisterNeurons
from vitreg_core.test_time import Neuron, with_attention_bias, with_test_time_registers
from vitreg_core.vit import VisionTransformer
from vitreg_eval import remedies
from vitreg_eval.advice import LAST_BLOCKS, MORE, RUN, advise, register_sibling
from vitreg_eval.config import DoctorOptions
from vitreg_eval.exam import Exam
from vitreg_eval.models import Model, open_model
from vitreg_eval.remedies import open_images, remedy
from vitreg_eval.report import Step
from vitreg_eval.survey import survey
from vitreg_recipes import find
from vitreg_recipes.distill.config import DistillConfig
from vitreg_recipes.signals.distill import build

Advise = Callable[..., list[Step]]


@torch.no_grad()
def planted(registers: int) -> VisionTransformer:
    """A model of four blocks with register neurons in block 1."""
    torch.manual_seed(0)
    model = create_model("vit_ti8", image_size=64, depth=4, embed_dim=96, layer_scale=0.1, registers=registers).eval()
    model.positions.patches.mul_(20)
    return plant_register_neurons(model, model.preprocess.normalize(draw_scenes(96, 3).image), layer=1)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with 0 and 2 registers, and forty photos in a folder whose name has a blank."""
    root = tmp_path_factory.mktemp("sources")
    for registers in (0, 2):
        save_model(planted(registers), root / f"reg{registers}")
    (root / "my photos").mkdir()
    for index, pixels in enumerate(draw_scenes(40, 5).image):
        picture = (255 * pixels.permute(1, 2, 0)).round().byte().numpy()
        Image.fromarray(np.ascontiguousarray(picture)).save(root / "my photos" / f"{index}.png")
    return root


@pytest.fixture
def advice(tmp_path: Path) -> Advise:
    """What is advised for a model."""

    def give(net: Model, **options: object) -> list[Step]:
        given = DoctorOptions(**{"test_images": 40, **options})
        found = survey(net, open_images(net, given), given, tmp_path / "survey")
        return advise(Exam("model", net, found, given, 8))

    return give


def commands(steps: list[Step], program: str) -> list[list[str]]:
    """Arguments of all commands of a program."""
    lines = [
        shlex.split(line)
        for step in steps
        if not step.command.startswith("import")
        for line in step.command.splitlines()
    ]
    begin = program.split()
    return [line[len(begin) :] for line in lines if line[: len(begin)] == begin]


def code(steps: list[Step]) -> list[str]:
    return [step.command for step in steps if step.command.startswith("import")]


def parsed(arguments: list[str]) -> DoctorOptions:
    options = parse_options(DoctorOptions(), arguments, "doctor")
    assert options.needs() == []
    return options


def distilled(arguments: list[str]) -> DistillConfig:
    default = find("distill_registers")
    assert isinstance(default, DistillConfig)
    config = parse_options(default, arguments, "distill_registers")
    config.check()
    return config


@pytest.mark.parametrize("registers", [0, 2])
def test_commands_run_as_printed(registers: int, folder: Path, advice: Advise) -> None:
    source, photos = str(folder / f"reg{registers}"), folder / "my photos"
    steps = advice(open_model(source), model=(source,), images=photos)
    examined = [parsed(arguments) for arguments in commands(steps, "vitreg-eval doctor")]
    assert [(one.remedy, one.after) for one in examined] == [("test-time", None), ("denoise", None), (None, RUN)]
    assert {(one.model, one.images) for one in examined} == {((source,), photos)}
    (arguments,) = commands(steps, "accelerate launch apps/train.py distill_registers")
    config = distilled(arguments)
    assert (config.data.path, str(config.out)) == (str(photos), RUN)
    teacher, student = build(config)  # which refuses what does not go together
    assert (teacher.num_registers, student.num_registers) == (registers, registers + MORE)
    assert config.last_blocks == 4
    (scenes,) = commands(steps, "accelerate launch apps/train.py deit3_scenes")
    parse_options(find("deit3_scenes"), scenes, "deit3_scenes").check()
    told = [step.text for step in steps if "registers already" in step.text]
    assert told == ([f"It has {registers} registers already, and outliers remain on the patches."] if registers else [])


def test_what_is_assumed_of_the_run_is_so() -> None:
    run = find("distill_registers")
    assert isinstance(run, DistillConfig)
    assert (run.last_blocks, run.model.registers) == (LAST_BLOCKS, MORE)
    assert f"runs/{'distill_registers'}" == RUN


@pytest.mark.parametrize("images", ["photos", "scenes"])
def test_the_python_runs_as_printed(
    images: str,
    folder: Path,
    advice: Advise,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = str(folder / "reg0")
    (text,) = code(
        advice(open_model(source), model=(source,), images=folder / "my photos" if images == "photos" else None)
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(text, names)
    pixels = names["images"]
    assert isinstance(pixels, torch.Tensor)
    assert pixels.shape == (40 if images == "photos" else 256, 3, 64, 64)
    assert load_model(tmp_path / "mended").config.moved is not None


def foreign(folder: Path) -> Model:
    """The model without registers, in timm's own class."""
    save_model(planted(0), folder, layout="timm")
    model = as_backbone(timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    model.source = "their model"
    return model


def test_models_of_other_libraries_are_not_trained_or_saved(
    advice: Advise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = foreign(tmp_path / "timm")
    steps = advice(model, model=("their model",))
    assert commands(steps, "accelerate launch apps/train.py distill_registers") == []
    (text,) = code(steps)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vitreg_eval.models.open_model", {"their model": model}.__getitem__)
    names: dict[str, object] = {}
    exec(text, names)
    assert RegisterNeurons.load("neurons.json") == names["found"]


@pytest.mark.parametrize("given", ["vit_ti8", "reg2"])
def test_the_source_is_what_was_typed(given: str, folder: Path, advice: Advise) -> None:
    """A preset says that its weights are random, a part of the registers how many there are."""
    typed = str(folder / given) if given == "reg2" else given
    model = open_model(str(folder / "reg2"))
    model = model.with_registers(1) if given == "reg2" else model
    model.source = f"{typed}, 1 registers" if given == "reg2" else f"{typed} (random weights)"
    steps = advice(model, model=("vit_ti", typed))
    assert {parsed(arguments).model for arguments in commands(steps, "vitreg-eval doctor")} == {(typed,)}
    assert all(f'"{typed}"' in text or f"'{typed}'" in text for text in code(steps))
    (arguments,) = commands(steps, "accelerate launch apps/train.py distill_registers")
    config = distilled(arguments)
    assert (config.init, config.data.path, config.model.registers) == (typed, "scenes", 2 + MORE)


@torch.no_grad()
def test_a_model_with_moved_neurons_is_not_edited_or_distilled_again(folder: Path, advice: Advise) -> None:
    source = str(folder / "reg0")
    plain, unused = load_model(source), [Neuron(0, 0)]
    images = plain.preprocess.normalize(draw_scenes(4, 3).image)
    for edited in (with_test_time_registers(plain, unused), with_attention_bias(plain, unused, images)):
        edited.source = source
        steps = advice(edited, model=(source,))
        assert [parsed(arguments).remedy for arguments in commands(steps, "vitreg-eval doctor")] == ["denoise"]
        assert code(steps) == commands(steps, "accelerate launch apps/train.py distill_registers") == []


@pytest.mark.parametrize(
    ("applied", "left"),
    [("test-time", ["denoise", None]), ("denoise", ["test-time", None]), ("random", ["test-time", "denoise", None])],
)
def test_the_remedy_just_applied_is_not_advised(
    applied: str, left: list[str | None], folder: Path, advice: Advise
) -> None:
    source = str(folder / "reg0")
    steps = advice(open_model(source), model=(source,), remedy=applied)
    assert [parsed(arguments).remedy for arguments in commands(steps, "vitreg-eval doctor")] == left
    assert len(code(steps)) == (applied != "test-time")


def test_a_clean_model_needs_nothing(advice: Advise) -> None:
    torch.manual_seed(0)
    model = create_model("vit_ti8", image_size=64, depth=4, embed_dim=96, layer_scale=0.1).eval()
    with torch.no_grad():
        model.positions.patches.mul_(20)
    (step,) = advice(model, test_images=20)
    assert step.text.startswith("Nothing")
    assert step.command == ""


@pytest.mark.parametrize(
    ("source", "sibling"),
    [
        ("dinov2_vitb14", "dinov2_vitb14_reg4"),
        ("weights/dinov2_vits14", "dinov2_vits14_reg4"),
        ("dinov2_vitb14_reg", None),
        ("dinov2_vitb14_reg4", None),
        ("runs/dinov2_vitb14_tuned", None),
        ("my_dinov2_vitb14", None),
        ("dinov2_vitb14/other", None),
        ("dino_vits16", None),
        ("timm:vit_small_patch14_dinov2.lvd142m", "timm:vit_small_patch14_reg4_dinov2.lvd142m"),
        ("timm:vit_small_patch14_reg4_dinov2.lvd142m", None),
        ("timm:vit_small_patch14_dinov2.lvd142m_tuned", None),
        ("transformers:facebook/dinov2-giant", "transformers:facebook/dinov2-with-registers-giant"),
        ("transformers:facebook/dinov2-with-registers-giant", None),
        ("transformers:facebook/dinov2-base-imagenet1k-1-layer", None),
    ],
)
def test_the_sibling_with_registers_is_named(source: str, sibling: str | None) -> None:
    assert register_sibling(source) == sibling


def test_the_sibling_stands_first(folder: Path, advice: Advise) -> None:
    model = open_model(str(folder / "reg0"))
    model.source = "dinov2_vits14"
    steps = advice(model, model=("dinov2_vits14",))
    assert parsed(shlex.split(steps[0].command)[2:]).model == ("dinov2_vits14_reg4",)


def test_a_remedy_keeps_what_was_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remedies, "CALIBRATION", 32)
    model = load_model(folder / "reg0")
    found = remedy(model, DoctorOptions(remedy="test-time"))
    assert found.neurons is not None
    assert found.neurons.verdict in found.told
    again = with_test_time_registers(model, found.neurons)
    images = model.preprocess.normalize(draw_scenes(2, 9).image)
    assert isinstance(found.model, VisionTransformer)
    with torch.no_grad():
        torch.testing.assert_close(again(images).tokens, found.model(images).tokens, rtol=0, atol=0)
    assert remedy(model, DoctorOptions(remedy="random")).neurons is None
    assert remedy(model, DoctorOptions(remedy="denoise")).neurons is None
