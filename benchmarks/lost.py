"""Object discovery by LOST: ours against the straightforward way, in turn, on one thread; boxes must be the same.

    python benchmarks/lost.py [--maps 40] [--seed 0]

The straightforward way is the textbook one: the whole Gram matrix, a copy with the negatives zeroed by a boolean mask,
its symmetric sum, a count, a sort and the summed rows of the voters. Time is CPU time, median over maps. Peak memory
is what the resident memory of a new process grows by while one map is searched, features not counted.
"""

import argparse
import time
from collections.abc import Callable
from ctypes import CDLL
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from vitreg_eval.discovery import Box
from vitreg_eval.lost import BLOCK_ROWS, discover

PATCH = 16


def straightforward(features: Tensor, grid: tuple[int, int], patch_size: int, image_size: tuple[int, int]) -> Box:
    """LOST as one would write it first; ties go to the lowest index, as in ours."""
    gram = features @ features.T
    positive = gram.clone()
    positive.fill_diagonal_(0)
    positive[positive < 0] = 0
    _ = positive + positive.T  # the original computes it, too
    order = (positive > 0).sum(dim=1).argsort(stable=True)
    seed = int(order[0])
    voters = order[:100][gram[seed, order[:100]] > 0]
    mask = (gram[voters].sum(dim=0) > 0).reshape(grid).numpy()
    labels, _ = ndimage.label(mask)
    rows, cols = (labels == labels.flat[seed]).nonzero()
    right, bottom = (int(cols.max()) + 1) * patch_size, (int(rows.max()) + 1) * patch_size
    return (
        int(cols.min()) * patch_size,
        int(rows.min()) * patch_size,
        min(right, image_size[1]),
        min(bottom, image_size[0]),
    )


def smooth_map(rows: int, cols: int, dim: int, generator: torch.Generator) -> Tensor:
    """Features that change slowly over the image, as those of a backbone do."""
    coarse = torch.randn(1, dim, max(2, rows // 6), max(2, cols // 6), generator=generator)
    fine = F.interpolate(coarse, (rows, cols), mode="bicubic", align_corners=True)
    return (fine + 0.3 * torch.randn(1, dim, rows, cols, generator=generator))[0].flatten(1).T.contiguous()


def timed(run: Callable[[], Box | Tensor]) -> tuple[Box | Tensor, float]:
    """Result and CPU seconds, which other load on the machine disturbs least."""
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def matmul_peak() -> float:
    """Floating-point operations per second of a large float32 product on this thread."""
    side = 2048
    left, right = torch.randn(2, side, side)
    return 2 * side**3 / min(timed(lambda: left @ right)[1] for _ in range(5))


def gram_operations(patches: int, dim: int) -> int:
    """Operations of the blocks on and above the diagonal, the only ones that ours computes."""
    size = BLOCK_ROWS["cpu"]
    return sum(2 * dim * min(size, patches - start) * (patches - start) for start in range(0, patches, size))


def ours(features: Tensor, grid: tuple[int, int], patch_size: int, image_size: tuple[int, int]) -> Box:
    """The box that our search gives."""
    return discover(features, grid, patch_size, image_size).box


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the mark was cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def peak_memory(search: Callable[..., Box], rows: int, cols: int, dim: int) -> int:
    """Bytes that a search adds to a process at most; a small map first loads libraries and their own buffers."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    search(smooth_map(8, 8, dim, generator), (8, 8), PATCH, (8 * PATCH, 8 * PATCH))
    features = smooth_map(rows, cols, dim, generator)
    CDLL("libc.so.6").malloc_trim(0)  # what the maps took must not be used again
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    search(features, (rows, cols), PATCH, (rows * PATCH, cols * PATCH))
    return resident("VmHWM") - before


def alone(search: Callable[..., Box], *size: int) -> int:
    """Peak memory in a process of its own, where nothing freed before can be used again."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, (search, *size))


def compare(rows: int, cols: int, dim: int, maps: int, seed: int, peak: float) -> None:
    """Print the medians and the ratios for one size."""
    generator = torch.Generator().manual_seed(seed)
    view = ((rows, cols), PATCH, (rows * PATCH - 5, cols * PATCH - 3))
    fast, slow = [], []
    for number in range(maps + 2):
        features = smooth_map(rows, cols, dim, generator)
        expected, theirs = timed(lambda: straightforward(features, *view))  # noqa: B023
        found, own = timed(lambda: ours(features, *view))  # noqa: B023
        if found != expected:
            raise SystemExit(f"map {number} of {rows} x {cols}: {found} is not {expected}")
        if number >= 2:  # the first two warm up
            fast.append(own)
            slow.append(theirs)
    share = gram_operations(rows * cols, dim) / median(fast) / peak
    little, much = alone(ours, rows, cols, dim), alone(straightforward, rows, cols, dim)
    print(
        f"{rows} x {cols} x {dim}: straightforward {median(slow) * 1e3:.1f} ms, ours {median(fast) * 1e3:.1f} ms, "
        f"{median(slow) / median(fast):.2f} times as fast; {share:.0%} of the matmul peak; {maps} boxes identical; "
        f"peak memory {much / 2**20:.1f} MiB, ours {little / 2**20:.1f} MiB, {little / much:.1%}"
    )


def main() -> None:
    """Run both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=40, help="maps per size")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    peak = matmul_peak()
    print(f"torch {torch.__version__}, one thread, float32 matmul peak {peak / 1e9:.0f} GFLOP/s, CPU time, medians")
    for rows, cols in ((30, 40), (60, 80)):
        compare(rows, cols, 384, options.maps, options.seed, peak)


if __name__ == "__main__":
    main()
