"""Forward pass: ours against timm and transformers, in turn, in one process, on the same weights.

    python benchmarks/forward.py [--cases s14_224,s14_518,b16_224] [--modes fp32,fp32-fast,bf16,bf16-autocast]
                                 [--repeats 7] [--threads 2] [--device cpu] [--json FILE]

Peers run as their users run them: eager, with their default attention, in the same number type (fp32-fast is compared
with peers in fp32, bf16 with peers in bf16). In every round each model runs once, so that a ratio compares neighbours
in time; ratios are medians over the rounds, to the best peer of a kind. Compiled models have frozen weights.
`share` is the part of the machine's matmul peak, measured in the same rounds in the same number type; `limit` is the
ratio to the best eager peer of a model that ran at that peak throughout. `memory` is what a pass adds at its peak.
Every model's patches are compared with ours in fp32 first; the greatest difference is printed.
"""

import argparse
import ctypes
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from vitreg_core import VisionTransformer, load_model, model_cost, save_model
from vitreg_core import attention as kernels
from vitreg_core.config import override
from vitreg_core.precision import use_precision

CASES = {  # image size, batch
    "s14_224": (224, 16),
    "s14_518": (518, 2),
    "b16_224": (224, 16),
}
MODES = ("fp32", "fp32-fast", "bf16", "bf16-autocast")
MATMUL = 2048
Pass = Callable[[], object]


def transformers_model(case: str, size: int) -> Any:
    """The peer whose random weights all use."""
    if case.startswith("s14"):
        shape = {"hidden_size": 384, "num_attention_heads": 6, "patch_size": 14, "image_size": size}
        return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**shape))
    return transformers.ViTModel(transformers.ViTConfig(layer_norm_eps=1e-6), add_pooling_layer=False)


def build(case: str, size: int) -> dict[str, Any]:
    """One model in three libraries."""
    theirs = transformers_model(case, size).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.normal_(parameter, mean=0.5, std=0.1)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder, "transformers"))
        ours = load_model(Path(folder, "transformers"), position_antialias=True)  # timm's way, the same at this size
        save_model(ours, Path(folder, "timm"), layout="timm")
        other = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval()
    return {"ours": ours, "timm": other, "transformers": theirs}


def forward(name: str, model: Any, images: Tensor) -> Tensor:
    """Tokens after the final norm."""
    if name.startswith("transformers"):
        return model(images).last_hidden_state
    return model.forward_features(images)


def check(models: dict[str, Any], images: Tensor) -> float:
    """Greatest difference of any token to ours, in fp32."""
    expected = forward("ours", models["ours"], images)
    return max((forward(name, model, images) - expected).abs().max().item() for name, model in models.items())


@contextmanager
def mode_of(mode: str, device: torch.device) -> Iterator[None]:
    """Precision of a mode; weights in bfloat16 need none."""
    precision = {"bf16-autocast": "bf16", "bf16": "fp32"}.get(mode, mode)
    with use_precision(precision, device):  # type: ignore[arg-type]
        yield


def passes(models: dict[str, Any], images: Tensor, mode: str) -> dict[str, Pass]:
    """What is timed: every model eager, ours and timm's compiled, and a matrix product."""
    device = images.device
    dtype = torch.float32 if mode.startswith("fp32") else torch.bfloat16
    if mode == "bf16":
        models, images = {name: model.to(dtype) for name, model in models.items()}, images.to(dtype)
    timed: dict[str, Pass] = {}
    for name, model in models.items():
        peer_mode = "fp32" if mode == "fp32-fast" and name != "ours" else mode
        timed[f"{name} eager"] = within(peer_mode, device, partial(forward, name, model, images))
    if models["ours"].num_registers:
        without = VisionTransformer(override(models["ours"].config, {"registers": 0})).eval().to(images)
        timed["ours eager, 0 registers"] = within(mode, device, partial(forward, "ours", without, images))
    for name in ("ours", "timm"):
        compiled = torch.compile(models[name].forward_features)
        timed[f"{name} compiled"] = within(mode, device, partial(compiled, images))
    if device.type == "cuda":
        timed["ours eager, no xFormers"] = without_xformers(timed["ours eager"])
    left, right = (torch.randn(MATMUL, MATMUL, device=device, dtype=dtype) for _ in range(2))
    timed["matmul"] = within(mode, device, lambda: left @ right)
    return timed


def within(mode: str, device: torch.device, run: Pass) -> Pass:
    """Run in the precision of a mode."""

    def run_within() -> object:
        with mode_of(mode, device):
            return run()

    return run_within


def without_xformers(run: Pass) -> Pass:
    """Run with torch's attention where xFormers is installed."""

    def run_without() -> object:
        found, kernels.xformers = kernels.xformers, lambda: None  # type: ignore[assignment]
        try:
            return run()
        finally:
            kernels.xformers = found

    return run_without


def seconds(run: Pass, device: torch.device) -> float:
    """Wall time of one pass."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(run: Pass, device: torch.device) -> float:
    """What a pass adds to the process at its peak, in MB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 1e3


def resident(field: str) -> int:
    """Resident memory, now or at its peak, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(
    timed: dict[str, Pass], repeats: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every pass in every round, and the memory of each."""
    for run in timed.values():
        run(), run()  # compile, warm up
    megabytes = {name: memory(run, device) for name, run in timed.items() if name != "matmul"}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, run in timed.items():
            times[name].append(seconds(run, device))
    return times, megabytes


def table(case: str, mode: str, times: dict[str, list[float]], megabytes: dict[str, float], flops: float) -> list[dict]:
    """One row per model."""
    batch = CASES[case][1]
    peak = [2 * MATMUL**3 / duration for duration in times["matmul"]]
    best = {kind: best_peer(times, kind) for kind in ("eager", "compiled")}
    limit = median(peer * rate / (batch * flops) for peer, rate in zip(times[best["eager"]], peak, strict=True))
    return [
        {
            "case": case,
            "mode": mode,
            "model": name,
            "images_per_s": batch / median(durations),
            "to_best_eager_peer": median(p / own for p, own in zip(times[best["eager"]], durations, strict=True)),
            "to_best_compiled_peer": median(p / own for p, own in zip(times[best["compiled"]], durations, strict=True)),
            "share_of_peak": median(batch * flops / own / rate for own, rate in zip(durations, peak, strict=True)),
            "limit": limit,
            "memory_mb": megabytes[name],
            "best_eager_peer": best["eager"],
        }
        for name, durations in times.items()
        if name != "matmul"
    ]


def best_peer(times: dict[str, list[float]], kind: str) -> str:
    """The fastest peer of a kind."""
    return min((name for name in times if kind in name and "ours" not in name), key=lambda name: median(times[name]))


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._inductor.config.freezing = True
    transformers.utils.logging.disable_progress_bar()
    device, rows = torch.device(options.device), []
    print(f"torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__}, {device}")
    for case in options.cases.split(","):
        size, batch = CASES[case]
        for mode in options.modes.split(","):
            torch.manual_seed(0)
            torch.compiler.reset()
            models = {name: model.to(device) for name, model in build(case, size).items()}
            images = torch.randn(batch, 3, size, size, device=device)
            with torch.no_grad():
                print(f"\n{case} {mode}, batch {batch}: greatest difference in fp32 {check(models, images[:1]):.1e}")
                flops = model_cost(models["ours"].config).flops
                times, megabytes = measure(passes(models, images, mode), options.repeats, device)
            for row in table(case, mode, times, megabytes, flops):
                print(
                    f"  {row['model']:24} {row['images_per_s']:8.1f} images/s  x{row['to_best_eager_peer']:.2f} of the "
                    f"best eager peer (limit x{row['limit']:.2f})  x{row['to_best_compiled_peer']:.2f} of the best "
                    f"compiled peer  {row['share_of_peak']:4.0%} of the peak  {row['memory_mb']:5.0f} MB"
                )
                rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
