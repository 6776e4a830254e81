"""What registers cost beside what they replace nothing of (registers paper, figure 12)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from vitreg_core.config import ViTConfig
from vitreg_core.cost import register_overhead

from vitreg_eval.analyses.panels import panels

COUNTS = (0, 1, 2, 4, 8, 16)


@dataclass(frozen=True)
class RegisterCost:
    """Growth over the same model without registers; 0.01 is one per cent."""

    counts: Int[np.ndarray, " counts"]
    """Numbers of registers."""
    flops: Float[np.ndarray, " counts"]
    """Growth in floating-point operations of a forward pass at the native image size."""
    parameters: Float[np.ndarray, " counts"]
    """Growth in parameters."""


def register_cost(config: str | ViTConfig, counts: Sequence[int] = COUNTS) -> RegisterCost:
    """Count what registers add.

    At most 2 % for four registers, as the paper says of its figure, holds for patches of 14 pixels at 224 pixels; with
    196 patches it is a little more.

    Args:
        config: shapes, or the name of a preset; its own number of registers does not matter.
        counts: numbers of registers.

    Raises:
        InputError: unknown preset, or a negative count.
    """
    overhead = register_overhead(config, counts)
    return RegisterCost(np.array(counts), overhead.flops.numpy(), overhead.parameters.numpy())


def plot_register_cost(costs: Mapping[str, RegisterCost]) -> Figure:
    """Growth in per cent by number of registers: a line per model, FLOPs solid and parameters dashed."""
    figure, grid = panels(1, 1, width=4.6, height=3.2)
    axes = grid[0, 0]
    for name, cost in costs.items():
        (line,) = axes.plot(cost.counts, 100 * cost.flops, "o-", label=f"FLOPs, {name}")
        axes.plot(cost.counts, 100 * cost.parameters, "s--", color=line.get_color(), label=f"parameters, {name}")
    axes.set_xlabel("registers")
    axes.set_ylabel("growth, %")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure
