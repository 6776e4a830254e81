"""What to do about artifacts, with the commands."""

import re

from vitreg_core.weights.official import OFFICIAL

from vitreg_eval.exam import Exam
from vitreg_eval.report import Step

PYTHON = """import torch
from vitreg_core import load_model, save_model
from vitreg_core.test_time import find_register_neurons, with_test_time_registers

model = load_model("{source}")
found = find_register_neurons(model, images)  # 100 to 1,000 preprocessed images
save_model(with_test_time_registers(model, found), "mended")"""


def advise(exam: Exam) -> list[Step]:
    """What to do, the least effort first."""
    source = exam.model.source
    if not exam.diagnosis.last.found:
        return [
            Step(
                "Nothing: feature and attention maps of these images are free of outlier tokens. Rare ones, below "
                "0.1 % of the patches, need at least 256 images to be seen."
            )
        ]
    doctor = f"vitreg-eval doctor --model {source} --images DIR"
    steps = [
        Step(
            "Without training: give the register neurons tokens of their own to write to. Before and after on images:",
            f"{doctor} --remedy test-time",
        ),
        Step("The same in Python, to keep:", PYTHON.format(source=source)),
        Step(
            "For smooth feature maps alone, with the weights as they are: average over shifts of the image, which "
            "artifacts do not follow. It costs as many forward passes as there are shifts.",
            f"{doctor} --remedy denoise",
        ),
        Step(
            "With a short training and no labels: registers by self-distillation, then before and after.",
            f"accelerate launch apps/train.py distill_registers --init {source} --data.path DIR\n{doctor} --after RUN",
        ),
        Step(
            "When a model is trained anyway: give it registers from the start, four are enough. Any run takes them:",
            "accelerate launch apps/train.py deit3_s16_reg4 --data.path DIR",
        ),
    ]
    if sibling := register_sibling(source):
        text = "Take the checkpoint that was trained with registers. Heads that read this one must be trained again."
        steps.insert(0, Step(text, f"vitreg-eval doctor --model {sibling} --images DIR"))
    if exam.model.num_registers:
        steps.insert(
            0, Step(f"It has {exam.model.num_registers} registers already, and outliers remain on the patches.")
        )
    return steps


def register_sibling(source: str) -> str | None:
    """Official name of the same model trained with registers; None where none was published."""
    found = re.search(r"dinov2_vit[sblg]14(?!_reg)", source)
    name = f"{found[0]}_reg4" if found else ""
    return name if name in OFFICIAL else None
