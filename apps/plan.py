"""What a run needs on GPUs: `apps/plan.py deit3_l16_in22k_90 --gpu h100 --gpus 8 --mfu 0.35`.

All options of `apps/train.py` count as well; nothing is trained or allocated.
"""

import sys

from pydantic import create_model
from vitreg_core.config import Config
from vitreg_core.options import one_line_errors, parse_options
from vitreg_recipes.config import RunConfig
from vitreg_recipes.plan import GPUS, Hardware, Plan, plan
from vitreg_recipes.runs import find, list_runs

PROGRAM = "plan.py"


def with_hardware(kind: type[RunConfig]) -> type[Config]:
    """The options of a kind of run, and what to train it on."""
    both: tuple[type[Config], ...] = (kind, Hardware)
    return create_model("Options", __base__=both, __doc__="A training run, and what to train it on.")


def print_plan(name: str, config: RunConfig, options: Hardware, found: Plan) -> None:
    """Print what a run needs, and what was assumed."""
    gpu, count = GPUS[options.gpu], options.gpus
    memory = found.fixed_bytes + found.image_bytes * (found.share // found.accumulate if found.accumulate else 1)
    print(f"{name} on {count} {options.gpu} ({gpu.teraflops:g} TFLOP/s in bf16, {gpu.gigabytes:g} GB each)")
    print(f"  model    {found.parameters / 1e6:.1f} M parameters; {found.flops / 1e9:.0f} GFLOP per image, both ways")
    print(f"  run      {found.images:.3g} images in {found.steps} steps of {config.data.batch_size}")
    print(f"  compute  {found.flops * found.images:.2e} FLOP")
    print(
        f"  memory   {memory / 1e9:.0f} GB per GPU: {found.fixed_bytes / 1e9:.1f} for weights, gradients, optimizer, "
        f"and {found.image_bytes / 1e6:.0f} MB for each image"
    )
    if found.accumulate:
        advice = "" if found.accumulate == 1 else f"; give --accumulate {found.accumulate}"
        print(f"  batch    {found.share} images per GPU, of which {found.room} fit at once{advice}")
    else:
        print(f"  batch    {found.share} images per GPU do not fit in any parts; take GPUs with more memory")
    print(f"  speed    {found.images_per_second:.0f} images/s, for which {found.cores} CPU cores must read and augment")
    print(f"  time     {found.days:.1f} days, {found.days * 24 * count:.0f} GPU hours")
    print(
        f"  assumed  {options.mfu:.0%} of the peak (--mfu), {options.reserve:.0%} of the memory for CUDA (--reserve), "
        f"{options.core_rate:g} images/s per core (--core_rate)"
    )


def main(arguments: list[str]) -> None:
    """Print what a run needs."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: apps/plan.py RUN [--gpu KIND] [--gpus N] [--mfu SHARE] [--option value ...]\n")
        print("\n".join(list_runs()))
        return
    name, *rest = arguments
    with one_line_errors(PROGRAM):
        run = find(name)
        options = parse_options(with_hardware(type(run))(**run.model_dump()), rest, f"{PROGRAM} {name}")
        config = type(run)(**options.model_dump(include=set(type(run).model_fields)))
        hardware = Hardware(**options.model_dump(include=set(Hardware.model_fields)))
        print_plan(name, config, hardware, plan(config, hardware))


if __name__ == "__main__":
    main(sys.argv[1:])
