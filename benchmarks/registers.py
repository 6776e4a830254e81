"""What 4 registers cost: a ViT at 224 px with and without, in turn, in one process, by CPU time.

    python benchmarks/registers.py [--preset vit_s14] [--batch 8] [--repeats 25]

Prints the median and quartiles, over the rounds, of the time with registers over the time without.
"""

import argparse
import time
from statistics import quantiles

import torch
from vitreg_core import VisionTransformer, create_model, register_overhead


def seconds(model: VisionTransformer, images: torch.Tensor) -> float:
    """CPU time of a forward pass, which other processes on the machine do not lengthen."""
    start = time.process_time()
    model(images)
    return time.process_time() - start


def main() -> None:
    """Both number types, on one thread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="vit_s14")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.randn(options.batch, 3, 224, 224)
    print(f"FLOPs: {register_overhead(options.preset, [4]).flops.item():.2%}")
    for dtype in (torch.float32, torch.bfloat16):
        without, registers = (create_model(options.preset, registers=count).eval().to(dtype) for count in (0, 4))
        with torch.inference_mode():
            rounds = range(options.repeats + 2)  # the first two warm up
            ratios = [seconds(registers, images) / seconds(without, images) - 1 for _ in rounds]
        low, middle, high = quantiles(ratios[2:], n=4)
        print(f"{dtype}: {middle:.2%} more time (quartiles {low:.2%} and {high:.2%})")


if __name__ == "__main__":
    main()
