"""Crops of two sizes through one ViT-S/14 with 4 registers: packed, in a loop, and padded, in turn, in one process.

    python benchmarks/packing.py [--images 4] [--repeats 7] [--threads 2] [--device cpu] [--json FILE]

Every image gives 2 crops of 224 and 8 of 98 pixels, as in DINOv2. `loop` calls the model once per size, `timm loop`
does so with timm's model and the same weights, `padded` fills the short sequences up and masks the filling in the
attention. A ratio is to the loop; medians over rounds in which each ran once. All ways give the same tokens; the
greatest difference to the loop is printed, of outputs and of gradients.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from vitreg_core import VisionTransformer, create_model, model_cost, save_model
from vitreg_core.attention import join_heads
from vitreg_core.block import Block
from vitreg_core.features import QKV
from vitreg_core.precision import use_precision

CROPS = {224: 2, 98: 8}  # side: crops of an image
MODES = ("fp32", "bf16")
MATMUL = 2048
Forward = Callable[[Sequence[Tensor]], list[Tensor]]


def packed(model: VisionTransformer, batches: Sequence[Tensor]) -> list[Tensor]:
    """All crops in one sequence."""
    return [features.tokens for features in model.packed(batches)]


def loop(model: Any, batches: Sequence[Tensor]) -> list[Tensor]:
    """One call per size."""
    return [model.forward_features(images) for images in batches]


def padded(model: VisionTransformer, batches: Sequence[Tensor]) -> list[Tensor]:
    """One batch of sequences as long as the longest."""
    embedded = [model.embed(images) for images in batches]
    longest = max(tokens.shape[1] for tokens in embedded)
    tokens = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in embedded])
    lengths = torch.tensor([part.shape[1] for part in embedded for _ in part], device=tokens.device)
    mask = (torch.arange(longest, device=tokens.device) < lengths[:, None])[:, None, None]
    for block in map(model.block, range(model.depth)):
        tokens = padded_block(block, tokens, mask)
    split = model.norm(tokens).split([len(part) for part in embedded])
    return [part[:, : whole.shape[1]] for part, whole in zip(split, embedded, strict=True)]


def padded_block(block: Block, tokens: Tensor, mask: Tensor) -> Tensor:
    """A block whose attention sees no filling."""
    parts: QKV = block.attn.project(block.norm1(tokens))
    mixed = F.scaled_dot_product_attention(parts.queries, parts.keys, parts.values, attn_mask=mask)
    tokens = tokens + block.ls1(block.attn.proj(join_heads(mixed)))
    return tokens + block.ls2(block.mlp(block.norm2(tokens)))


def timm_copy(model: VisionTransformer) -> Any:
    """Timm's model with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder, layout="timm")
        return timm.create_model(f"local-dir:{folder}", pretrained=True, dynamic_img_size=True).to(model.device)


def gradients(model: Any, outputs: list[Tensor]) -> Tensor:
    """Gradients of all weights for a fixed sum of outputs."""
    model.zero_grad()
    torch.stack([part.float().square().mean() for part in outputs]).sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def check(ways: dict[str, tuple[Any, Forward]], batches: Sequence[Tensor]) -> str:
    """Greatest difference of outputs and, relative to the greatest, of gradients, in fp32."""
    lines = []
    expected = ways["loop"][1](batches)
    wanted = gradients(ways["loop"][0], expected)
    for name in ("packed", "padded"):
        model, forward = ways[name]
        found = forward(batches)
        error = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
        slope = (gradients(model, found) - wanted).abs().max() / wanted.abs().max()
        lines.append(f"{name} {error:.1e}, gradients {slope.item():.1e}")
    error = max((a - b).abs().max().item() for a, b in zip(ways["timm loop"][1](batches), expected, strict=True))
    return "; ".join([*lines, f"timm {error:.1e}"])


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(ways: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every way in every round."""
    for run in ways.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            times[name].append(seconds(run, device))
    return times


def compare(
    ways: dict[str, tuple[Any, Forward]], batches: Sequence[Tensor], mode: str, *, backward: bool, repeats: int
) -> list[dict[str, object]]:
    """One row per way."""
    device = batches[0].device
    left, right = (
        torch.randn(MATMUL, MATMUL, device=device, dtype=torch.bfloat16 if mode == "bf16" else torch.float32)
        for _ in range(2)
    )

    def run(model: Any, forward: Forward) -> None:
        with use_precision(mode, device), torch.set_grad_enabled(backward):  # type: ignore[arg-type]
            outputs = forward(batches)
        if backward:
            gradients(model, outputs)

    timed = {name: (lambda way=way: run(*way)) for name, way in ways.items()}
    times = measure(timed | {"matmul": lambda: left @ right}, repeats, device)
    flops = sum(len(images) * model_cost("vit_s14_reg4", images.shape[-1]).flops for images in batches)
    work = flops * (3 if backward else 1)
    peak = [2 * MATMUL**3 / duration for duration in times.pop("matmul")]
    return [
        {
            "mode": mode,
            "pass": "forward and backward" if backward else "forward",
            "way": name,
            "ms": median(durations) * 1e3,
            "to_loop": median(a / b for a, b in zip(times["loop"], durations, strict=True)),
            "share_of_peak": median(work / own / rate for own, rate in zip(durations, peak, strict=True)),
        }
        for name, durations in times.items()
    ]


def main() -> None:
    """Forward, then forward and backward, in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, rows = torch.device(options.device), []
    model = create_model("vit_s14_reg4").eval().to(device)
    theirs = timm_copy(model).eval()
    batches = [torch.randn(options.images * crops, 3, side, side, device=device) for side, crops in CROPS.items()]
    ways: dict[str, tuple[Any, Forward]] = {
        "packed": (model, lambda parts: packed(model, parts)),
        "loop": (model, lambda parts: loop(model, parts)),
        "padded": (model, lambda parts: padded(model, parts)),
        "timm loop": (theirs, lambda parts: loop(theirs, parts)),
    }
    print(f"torch {torch.__version__}, timm {timm.__version__}, {device}; {options.images} images of 2 + 8 crops")
    print(f"greatest difference to the loop in fp32: {check(ways, batches)}")
    for mode in MODES:
        for backward in (False, True):
            for row in compare(ways, batches, mode, backward=backward, repeats=options.repeats):
                print(
                    f"  {row['mode']} {row['pass']:21} {row['way']:10} {row['ms']:8.1f} ms  x{row['to_loop']:.2f} of "
                    f"the loop  {row['share_of_peak']:4.0%} of the peak"
                )
                rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
