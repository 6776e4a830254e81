"""What to do about artifacts, with commands that run as they are printed."""

import re
from shlex import quote

from vitreg_core.registers import Registers
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights.official import OFFICIAL

from vitreg_eval.config import DoctorOptions
from vitreg_eval.exam import Exam
from vitreg_eval.report import Step

PYTHON = """import torch
{imports}
from vitreg_core.test_time import find_register_neurons, with_test_time_registers

model = {open_model}
{images}
found = find_register_neurons(model, images)
{end}"""
PHOTOS = """from pathlib import Path
from vitreg_core.data.images import list_images, read_image

paths = list_images(Path({folder!r}))[:256]
images = torch.stack([model.preprocess(read_image(path)) for path in paths])"""
SCENES = """from vitreg_core.data.scenes import draw_scenes

drawn = draw_scenes(256, seed=0, image_size=model.preprocess.config.image_size)
images = model.preprocess.normalize(drawn.image)"""
LAST_BLOCKS = 6
"""Blocks that the run distill_registers trains."""
MORE = 4
"""Registers that it adds."""
RUN = "runs/distill_registers"
"""Where it writes."""
SIBLINGS = (
    (r"timm:(vit_(?:small|base|large|giant)_patch14)_(dinov2\.lvd142m)", r"timm:\1_reg4_\2"),
    (r"transformers:facebook/dinov2-(small|base|large|giant)", r"transformers:facebook/dinov2-with-registers-\1"),
)
"""Names of models of other libraries, and of the same trained with registers."""


def advise(exam: Exam) -> list[Step]:
    """What to do, the least effort first."""
    if not exam.diagnosis.judged.found:
        return [
            Step(
                "Nothing: feature and attention maps of these images are free of outlier tokens. Rare ones, below "
                "0.1 % of the patches, need at least 256 images to be seen."
            )
        ]
    return [*known(exam), *moving(exam), *denoising(exam), *training(exam)]


def known(exam: Exam) -> list[Step]:
    """What the model has already, and which one was trained with registers."""
    steps, options = [], options_of(exam)
    if exam.model.num_registers:
        text = f"It has {exam.model.num_registers} registers already, and outliers remain on the patches."
        steps.append(Step(text))
    if sibling := register_sibling(typed(exam)):
        text = "Take the checkpoint that was trained with registers. Heads that read this one must be trained again."
        steps.append(Step(text, doctor(sibling, options)))
    return steps


def moving(exam: Exam) -> list[Step]:
    """Test-time registers, unless this model has some, or the page shows what they do."""
    options = options_of(exam)
    if options.remedy == "test-time" or has_moved(exam):
        return []
    text = "Without training: give the register neurons tokens of their own to write to. Before and after on images"
    text += ", 32 of them at least:" if options.images else ":"
    steps = [Step(text, f"{doctor(typed(exam), options)} --remedy test-time")]
    return [*steps, Step("The same in Python, to keep:", snippet(exam))]


def denoising(exam: Exam) -> list[Step]:
    """Averages over shifts, unless the page shows them."""
    options = options_of(exam)
    if options.remedy == "denoise":
        return []
    text = (
        "For smooth feature maps alone, with the weights as they are: average over shifts of the image, which "
        "artifacts do not follow. It costs as many forward passes as there are shifts."
    )
    return [Step(text, f"{doctor(typed(exam), options)} --remedy denoise")]


def training(exam: Exam) -> list[Step]:
    """Registers that are trained: into this model, where it is one of ours as it was trained, or from the start."""
    options, steps = options_of(exam), []
    if isinstance(exam.model, VisionTransformer) and not has_moved(exam):
        text = "With a short training and no labels: registers by self-distillation, then before and after."
        commands = [distil(exam.model, typed(exam), options), f"{doctor(typed(exam), options)} --after {RUN}"]
        steps.append(Step(text, "\n".join(commands)))
    text = (
        "When a model is trained anyway: give it registers from the start, four are enough. Any run takes them, such "
        "as a small one on drawn scenes:"
    )
    return [*steps, Step(text, "accelerate launch apps/train.py deit3_scenes --model.registers 4")]


def distil(model: VisionTransformer, source: str, options: DoctorOptions) -> str:
    """The command that adds registers to a model."""
    data = "scenes" if options.images is None else quote(str(options.images))
    words = [f"accelerate launch apps/train.py distill_registers --init {quote(source)} --data.path {data}"]
    if there := all_registers(model):
        words.append(f"--model.registers {there + MORE}")
    if model.depth < LAST_BLOCKS:
        words.append(f"--last_blocks {model.depth}")
    return " ".join([*words, f"--out {RUN}"])


def doctor(source: str, options: DoctorOptions) -> str:
    """The command that examines a model on the same images."""
    images = "" if options.images is None else f" --images {quote(str(options.images))}"
    return f"vitreg-eval doctor --model {quote(source)}{images}"


def snippet(exam: Exam) -> str:
    """Test-time registers in Python; a model of another library cannot be saved, but its neurons can."""
    ours, folder = isinstance(exam.model, VisionTransformer), options_of(exam).images
    return PYTHON.format(
        imports="from vitreg_core import load_model, save_model"
        if ours
        else "from vitreg_eval.models import open_model",
        open_model=f"{'load_model' if ours else 'open_model'}({typed(exam)!r})",
        images=SCENES if folder is None else PHOTOS.format(folder=str(folder)),
        end='save_model(with_test_time_registers(model, found), "mended")'
        if ours
        else 'mended = with_test_time_registers(model, found)\nfound.save("neurons.json")',
    )


def options_of(exam: Exam) -> DoctorOptions:
    """Options of the command that is run."""
    assert isinstance(exam.options, DoctorOptions)
    return exam.options


def typed(exam: Exam) -> str:
    """The SOURCE that the user gave: that of a model says more, such as how many of its registers are in use."""
    source = exam.model.source
    begins = [given for given in exam.options.model if re.match(rf"{re.escape(given)}($|, | \()", source)]
    return max(begins, key=len, default=source)


def has_moved(exam: Exam) -> bool:
    """Whether the model has test-time registers or attention biases."""
    return isinstance(exam.model, VisionTransformer) and exam.model.config.moved is not None


def all_registers(model: VisionTransformer) -> int:
    """Registers in the weights of a model, of which some may be left out."""
    assert isinstance(model.registers, Registers)
    return len(model.registers.tokens)


def register_sibling(source: str) -> str | None:
    """Name of the same model trained with registers; None where none was published."""
    name = f"{source.rpartition('/')[2]}_reg4"
    if name in OFFICIAL and "_reg_" not in name:
        return name
    return next((found.expand(with_it) for one, with_it in SIBLINGS if (found := re.fullmatch(one, source))), None)
