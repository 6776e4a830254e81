"""What moving neurons to test-time registers costs: ViTs at 224 px before and after, in turn, in one process.

    python benchmarks/test_time.py [--batch 8] [--tokens 1 4] [--neurons 10] [--repeats 25]

The neurons are spread over four blocks; which they are makes no difference to the time. Three models take turns: the
original, the original with as many plain registers, and the one with test-time registers. Prints medians over the
rounds, with quartiles, of CPU time over that of the original, and over that with plain registers (the cost of the edit
beyond that of the tokens).
"""

import argparse
import time
from statistics import quantiles

import torch
from vitreg_core import VisionTransformer, create_model
from vitreg_core.test_time import Neuron, with_test_time_registers

PRESETS = ("vit_s16", "vit_ti16")


def seconds(model: VisionTransformer, images: torch.Tensor) -> float:
    """CPU time of a forward pass, which other processes on the machine do not lengthen."""
    start = time.process_time()
    model(images)
    return time.process_time() - start


def spread(ratios: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = quantiles(ratios, n=4)
    return f"x{middle:.3f} (quartiles {low:.3f} and {high:.3f})"


def main() -> None:
    """Every preset and number of tokens, on one thread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--neurons", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.randn(options.batch, 3, 224, 224)
    neurons = [Neuron(4 + index % 4, 7 * index) for index in range(options.neurons)]
    for preset in PRESETS:
        plain = create_model(preset).eval()
        for tokens in options.tokens:
            longer = create_model(preset, registers=tokens).eval()
            edited = with_test_time_registers(plain, neurons, tokens)
            with torch.inference_mode():
                rounds = [
                    [seconds(model, images) for model in (plain, longer, edited)] for _ in range(options.repeats + 2)
                ][2:]  # the first two warm up
            whole = spread([after / before for before, _, after in rounds])
            beyond = spread([after / registers for _, registers, after in rounds])
            print(f"{preset}, {tokens} tokens: {whole} of the original; {beyond} of plain registers")


if __name__ == "__main__":
    main()
