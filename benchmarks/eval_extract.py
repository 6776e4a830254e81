"""What extraction to disk takes beyond a bare forward pass, in turn, in one process, on the same images.

    python benchmarks/eval_extract.py [--images DIR] [--count 128] [--batch 32] [--repeats 3] [--model vit_s16]
                                      [--precision fp32] [--threads 2] [--device cpu]

The bare loop runs the model over prepared tensors in memory and keeps nothing. Extraction writes to a fresh cache
folder and reads it back, hashing of the weights included: from the same tensors, and with --images from the files of a
folder, which are decoded and prepared meanwhile. `preparing` is that alone, in the threads of extraction: where the
cores that compute the features also decode, its processor time comes on top, whoever does it. In every round each runs
once; ratios are medians over the rounds, of wall time and of the processor time of all threads, which a busy machine
disturbs less. `share` is the bare loop's part of the machine's matmul peak, measured in the same rounds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from vitreg_core import create_model, model_cost
from vitreg_core.data.images import list_images
from vitreg_core.precision import use_precision
from vitreg_core.vit import VisionTransformer
from vitreg_eval.config import KnnOptions, TaskOptions
from vitreg_eval.datasets import Batch, ImageSet, image_files
from vitreg_eval.extract import extract
from vitreg_eval.results import DataRecord
from vitreg_eval.tokens import Wanted

MATMUL = 2048
WANTED = {
    "cls": Wanted(dtype=torch.float16),
    "cls and patches": Wanted(parts=("cls", "patches"), dtype=torch.float16),
}


def preloaded(batches: list[Tensor]) -> ImageSet:
    """A set of tensors that are there."""
    images = torch.cat(batches)

    def part(start: int, stop: int) -> Iterator[Batch]:
        for rows in images[start:stop].split(len(batches[0])):
            yield Batch(rows, {})

    record = DataRecord(name="tensors", split="", n=len(images), hash="")
    return ImageSet(record, part, {})


def from_files(model: VisionTransformer, folder: Path, count: int, batch: int) -> ImageSet:
    """The first files of a folder."""
    return image_files(model.preprocess, list_images(folder)[:count], folder, "", batch)


@torch.no_grad()
def bare(model: VisionTransformer, batches: list[Tensor], options: TaskOptions) -> None:
    """Run the model and keep nothing."""
    for images in batches:
        with use_precision(options.precision, model.device):
            model.features(images.to(model.device))
    synchronize(model)


def to_disk(model: VisionTransformer, images: ImageSet, options: TaskOptions, wanted: Wanted) -> None:
    """Extract into a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        extract(model, images, options, wanted, Path(folder))


def matmul(left: Tensor, right: Tensor, model: VisionTransformer, options: TaskOptions) -> None:
    """One large product in the same precision."""
    with use_precision(options.precision, model.device):
        left @ right
    synchronize(model)


def synchronize(model: VisionTransformer) -> None:
    """Wait for the device."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def prepare(images: ImageSet) -> None:
    """Decode and prepare files alone."""
    for _ in images.batches():
        pass


def measure(timed: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each in every round, after a first pass: wall time, processor time."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    next(iter(timed.values()))()
    for _ in range(repeats):
        for name, run in timed.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return times


def main() -> None:
    """Time all and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photos")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="vit_s16")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp32-fast", "bf16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    options = KnnOptions(precision=given.precision, batch_size=given.batch)
    model = create_model(given.model).to(given.device).eval()
    size = model.preprocess.config.image_size
    batches = list(torch.randn(given.count, 3, size, size).split(given.batch))
    if given.images:
        batches = [part.images for part in from_files(model, given.images, given.count, given.batch).batches()]
    left, right = (torch.randn(MATMUL, MATMUL, device=given.device) for _ in range(2))
    timed: dict[str, Callable[[], object]] = {
        "bare forward": lambda: bare(model, batches, options),
        "matmul": lambda: matmul(left, right, model, options),
    }
    sources = {"tensors": preloaded(batches)}
    if given.images:
        sources["files"] = from_files(model, given.images, given.count, given.batch)
        timed["preparing files"] = lambda: prepare(sources["files"])
    for source, images in sources.items():
        for kept, wanted in WANTED.items():
            timed[f"{kept} from {source}"] = lambda images=images, wanted=wanted: to_disk(  # type: ignore[misc]
                model, images, options, wanted
            )
    report(measure(timed, given.repeats), sum(map(len, batches)), model_cost(model.config).flops, given)


def report(times: dict[str, list[tuple[float, float]]], count: int, flops: float, given: argparse.Namespace) -> None:
    """Print a line for each."""
    base = times["bare forward"]
    rates = [2 * MATMUL**3 / wall for wall, _ in times.pop("matmul")]
    share = median(count * flops / wall / rate for (wall, _), rate in zip(base, rates, strict=True))
    print(f"{given.model}, {count} images, {given.precision}, {given.device}, {given.threads} threads")
    for name, rounds in times.items():
        wall, processor = (median(own[i] / bare[i] for own, bare in zip(rounds, base, strict=True)) for i in range(2))
        rate = count / median(seconds for seconds, _ in rounds)
        print(f"  {name:28} {rate:8.1f} images/s  x{wall:.3f} of the bare forward, x{processor:.3f} in processor time")
    print(f"  the bare forward runs at {share:.0%} of the machine's matmul peak")


if __name__ == "__main__":
    main()
