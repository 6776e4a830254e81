"""What importing vitreg_core costs over importing torch, in fresh processes in turn; medians in seconds.

python benchmarks/imports.py [--repeats 7]
"""

import argparse
import subprocess
import sys
from statistics import median

STATEMENTS = (
    "import vitreg_core",
    "from vitreg_core import create_model",
    "from vitreg_core import VisionTransformer, load_model, save_model, capture, model_cost",
)
TIMED = "import torch, time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    """Wall time of a statement after torch is there."""
    command = [sys.executable, "-c", TIMED.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603 (own words)


def main() -> None:
    """Print a line per statement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    rounds = [[seconds(statement) for statement in STATEMENTS] for _ in range(options.repeats)]
    for statement, times in zip(STATEMENTS, zip(*rounds, strict=True), strict=True):
        print(f"{median(times):.3f} s  {statement}")


if __name__ == "__main__":
    main()
