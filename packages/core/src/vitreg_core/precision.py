"""Arithmetic precision as one visible choice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "fp32-fast", "bf16"]


@contextmanager
def use_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute in one precision inside the block, and as before after it.

    `fp32` is exact float32; `fp32-fast` lets the library pick faster float32 products (TF32 on CUDA; oneDNN on CPUs,
    which may round inputs to bfloat16 where the CPU has such units); `bf16` is bfloat16 autocast.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "fp32-fast" else "highest")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
