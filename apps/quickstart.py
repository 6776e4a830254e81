"""The main job in one command: train with and without registers on drawn scenes, evaluate, and show what changed.

    uv run apps/quickstart.py
    uv run apps/quickstart.py --images photos --model path/to/weights

It takes a few minutes on two CPU cores, needs no network and no data, and writes runs/quickstart/report.html.
"""

import os
import sys
from pathlib import Path

from pydantic import Field, PositiveInt
from vitreg_core.config import Config
from vitreg_core.errors import InputError
from vitreg_core.options import one_line_errors, parse_options

PROGRAM = "quickstart"


class QuickstartOptions(Config):
    """Train a register vision transformer on drawn scenes with and without registers, evaluate both, write a page."""

    out: Path = Path("runs/quickstart")
    """Folder for the two runs, result.json and report.html; an earlier quickstart there is continued."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of everything; the same seed gives the same numbers."""
    registers: PositiveInt = 4
    """Registers of the second model."""
    steps: PositiveInt | None = None
    """Training steps of each model; those of deit3_scenes if not given."""
    train_images: int = Field(default=2048, ge=50)
    """Scenes that probes and heads are fitted on."""
    test_images: PositiveInt = 1024
    """Scenes that everything is measured on."""
    head_steps: PositiveInt = 300
    """Optimizer steps of the segmentation and the depth head."""
    images: Path | None = None
    """Folder of photos: adds a part on them, with --model."""
    model: str | None = None
    """SOURCE of real weights for the part on photos."""
    limit: PositiveInt = 256
    """Photos to read, evenly spread over the folder."""


def main() -> None:
    """Run the quickstart; bad input ends with one line and exit code 2."""
    with one_line_errors(PROGRAM):
        options = parse_options(QuickstartOptions(), sys.argv[1:], PROGRAM)
        check(options)
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin slow each other down on busy cores
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")
        from quickstart_job import quickstart  # imports torch, which --help does without

        try:
            quickstart(options)
        except KeyboardInterrupt:
            sys.exit("quickstart: stopped; the same command continues")


def check(options: QuickstartOptions) -> None:
    """Refuse halves of a pair before minutes have passed."""
    if (options.images is None) != (options.model is None):
        missing = "--model" if options.model is None else "--images"
        raise InputError(f"{missing} is missing; the part on photos needs both --images DIR and --model SOURCE")


if __name__ == "__main__":
    main()
