"""The doctor's pass over the images: its time against a bare forward pass, and its memory at more and more images.

    python benchmarks/survey.py [--model vit_s16] [--batch 16] [--rounds 9] [--counts 1000 10000]

Time: both run in turn in one process on the same tensors, one thread, in seconds of CPU time, so that other work on the
machine does not count. Memory: a process for each number of drawn scenes, its largest resident set as the system counts
it, with everything that the doctor reads from the records (verdict, positions, focus, neighbours).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from vitreg_core import create_model
from vitreg_eval.config import DoctorOptions
from vitreg_eval.datasets import TolerantSet, scenes
from vitreg_eval.exam import Exam
from vitreg_eval.survey import PARTS, look, survey


def compare_times(preset: str, batch: int, rounds: int) -> None:
    """Print the ratio of the times of a batch."""
    model = create_model(preset).eval()
    images = torch.randn(batch, 3, 224, 224)
    ratios = []
    for turn in range(rounds + 1):
        started = time.process_time()
        with torch.no_grad():
            model(images)
        bare = time.process_time() - started
        started = time.process_time()
        look(model, "fp32", PARTS, images)
        if turn:  # the first one warms up
            ratios.append((time.process_time() - started) / bare)
    print(f"{preset} at 224 px: {median(ratios):.3f} of a bare forward pass ({min(ratios):.3f} to {max(ratios):.3f})")


def measure_memory(count: int) -> None:
    """Survey drawn scenes with a small model in this process, and print its largest resident set in MiB."""
    torch.set_num_threads(1)
    model = create_model("vit_ti8_reg4", image_size=64, depth=4).eval()
    options = DoctorOptions(test_images=count)
    with tempfile.TemporaryDirectory() as folder:
        found = survey(model, TolerantSet(scenes(model.preprocess, count, 0, "test"), []), options, Path(folder))
        exam = Exam("model", model, found, options, 64)
        assert exam.diagnosis.patches == count * 64
        for name in ("positions", "input_neighbours", "output_neighbours", "facets", "focus", "register_similarity"):
            getattr(exam, name)
    status = Path("/proc/self/status").read_text()  # getrusage would count what the parent held when it forked
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def compare_memory(counts: list[int]) -> None:
    """Print the peak memory of each number of images, and its growth."""
    command = [sys.executable, __file__, "--memory_of"]
    peaks = {}
    for count in counts:
        ran = subprocess.run([*command, str(count)], check=True, capture_output=True, text=True)  # noqa: S603 (this file)
        peaks[count] = float(ran.stdout.split()[-1])
        print(f"{count} images: {peaks[count]:.0f} MiB at most, {peaks[count] / peaks[counts[0]] - 1:+.1%}")


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_s16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--memory_of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        measure_memory(options.memory_of)
        return
    torch.set_num_threads(1)
    compare_times(options.model, options.batch, options.rounds)
    compare_memory(options.counts)


if __name__ == "__main__":
    main()
