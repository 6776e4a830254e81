"""Training step: our loop against a plain timm and Accelerate loop, in turn, in one process, from the same weights.

    python benchmarks/train_step.py [--cases s16,small] [--modes fp32,bf16] [--rounds 9] [--threads 2]
                                    [--device cpu] [--json FILE]

Ours is `vitreg_recipes.train` itself, with log, checkpoint, stop and progress hooks, on batches that lie in memory; the
peer's step runs inside a hook, on the batch that ours has just seen. The peer is timm's ViT with registers and constant
drop path, timm's Mixup, BCE and LAMB, and Accelerate's `prepare` and `backward`: no hooks, no schedule, no log.
In every round both run once, so that a ratio compares neighbours in time; ratios are medians over the rounds.
`loop` is the share of our step that is neither forward, backward nor optimizer. `share` is the part of the machine's
matmul peak, measured in the same rounds in the same number type, that the step's products take (three times those of a
forward pass). No checkpoint falls into the rounds. Logits are compared in fp32; the greatest difference is printed.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from timm.data import Mixup
from timm.layers import DropPath
from timm.loss import BinaryCrossEntropy
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor
from vitreg_core import model_cost, save_model
from vitreg_core.config import PreprocessConfig, ViTConfig, override
from vitreg_core.vit import VisionTransformer
from vitreg_recipes import find, loop
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data import Batch, Share
from vitreg_recipes.signals import classify
from vitreg_recipes.state import TrainState

CASES = {  # shapes, classes, batch
    "s16": (ViTConfig(embed_dim=384, depth=12, num_heads=6, registers=4, layer_scale=1e-4, drop_path=0.05), 1000, 16),
    "small": (
        ViTConfig(image_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, registers=4, layer_scale=1e-4),
        6,
        32,
    ),
}
MODES = ("fp32", "bf16")
MATMUL = 2048
WARM_UP = 2


class FixedData:
    """One batch in memory, again and again."""

    def __init__(self, config: TrainConfig, classes: int, device: torch.device) -> None:
        size = config.model.size[0]
        self.classes = [str(index) for index in range(classes)]
        self.images = 0
        self.preprocess = PreprocessConfig(image_size=size)
        self.skipped: set[str] = set()
        self.batch = Batch(
            torch.randn(config.data.batch_size, 3, size, size, device=device),
            torch.randint(classes, (config.data.batch_size,), device=device),
        )

    def epoch_steps(self, _share: Share) -> int:
        """Steps of an epoch."""
        return 1000

    def batches(self, _step: int, _share: Share, _device: torch.device) -> Iterator[Batch]:
        """Yield the batch without end."""
        while True:
            yield self.batch


class Peer:
    """The loop that timm and Accelerate users write."""

    def __init__(self, state: TrainState, classes: int) -> None:
        config = state.config
        assert isinstance(config, TrainConfig)
        self.model = timm_model(config.model, classes)
        optimizer = create_optimizer_v2(
            self.model, "lamb", lr=config.optim.lr, weight_decay=config.optim.weight_decay, eps=1e-8
        )
        self.accelerator = state.accelerator
        self.network, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.mixup = Mixup(config.mix.mixup, config.mix.cutmix, label_smoothing=0.0, num_classes=classes)
        self.criterion = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)

    def step(self, batch: Batch) -> None:
        """One training step."""
        self.network.train()
        images, targets = self.mixup(batch.images, batch.labels)
        loss = self.criterion(self.network(images), targets)
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()


def timm_model(config: ViTConfig, classes: int) -> Any:
    """Timm's ViT of the same shapes, with drop path alike in all blocks."""
    model = TimmTransformer(
        img_size=config.size,
        patch_size=config.patch_size,
        num_classes=classes,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        init_values=config.layer_scale,
        reg_tokens=config.registers,
        no_embed_class=True,
    )
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = DropPath(config.drop_path), DropPath(config.drop_path)
    return model


@torch.no_grad()
def check(ours: VisionTransformer, peer: Peer, images: Tensor) -> float:
    """Copy our weights to the peer; greatest difference of the logits, in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, Path(folder), layout="timm")
        peer.model.load_state_dict(load_file(Path(folder, "model.safetensors")))
    ours.eval(), peer.model.eval()
    return (ours.classify(images) - TimmTransformer.forward(peer.model, images)).abs().max().item()


class Turns:
    """A hook of our loop: notes how long our step took, then runs the peer's."""

    def __init__(self, data: FixedData, classes: int) -> None:
        self.data = data
        self.classes = classes
        self.peer: Peer | None = None
        self.difference = 0.0
        self.times: dict[str, list[float]] = {name: [] for name in ("ours", "inside", "timm", "matmul")}
        self.inside = 0.0
        self.began = 0.0

    def __call__(self, state: TrainState, _metrics: Mapping[str, Tensor]) -> None:
        """Run everything once in turn."""
        if self.peer is None:
            self.start(state)
        else:
            self.times["ours"].append(self.clock() - self.began)
            self.times["inside"].append(self.inside)
            self.times["timm"].append(self.seconds(lambda: self.peer.step(self.data.batch)))  # type: ignore[union-attr]
            self.times["matmul"].append(self.seconds(lambda: self.left @ self.left))
        self.inside, self.began = 0.0, self.clock()

    def start(self, state: TrainState) -> None:
        """Build the peer, and time the parts of our step from now on."""
        device = state.accelerator.device
        self.peer = Peer(state, self.classes)
        assert isinstance(state.model, VisionTransformer)
        self.difference = check(state.model, self.peer, self.data.batch.images[:2])
        dtype = torch.bfloat16 if state.config.precision == "bf16" else torch.float32
        self.left = torch.randn(MATMUL, MATMUL, device=device, dtype=dtype)
        for owner in (state.objective, state.optimizer):
            owner.step = self.timed(owner.step)  # type: ignore[method-assign]

    def timed(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """Add the time of a part of the step to `inside`."""

        def run(*arguments: object) -> object:
            start = self.clock()
            result = part(*arguments)
            self.inside += self.clock() - start
            return result

        return run

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall time."""
        start = self.clock()
        run()
        return self.clock() - start

    def clock(self) -> float:
        """Seconds, once the device has done what it was asked."""
        if self.data.batch.images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(case: str, mode: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Train a few steps and compare."""
    shapes, classes, batch = CASES[case]
    AcceleratorState._reset_state(reset_partial_state=True)
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "model": shapes.model_dump(),
            "data.batch_size": batch,
            "steps": WARM_UP + rounds + 1,
            "optim.warmup_steps": 0,
            "precision": mode,
            "save_every": 10**6,
            "out": folder,
        }
        config = override(find("deit3_scenes"), changes)
        assert isinstance(config, TrainConfig)
        data = FixedData(config, classes, device)
        classify.open_data = lambda _config: data  # type: ignore[attr-defined, assignment]
        turns = Turns(data, classes)
        loop.train(config, hooks=[turns])
    return row(case, mode, turns, batch * model_cost(shapes).flops * 3)


def row(case: str, mode: str, turns: Turns, flops: float) -> dict[str, Any]:
    """What the rounds say."""
    ours, inside, peer, matmul = (turns.times[name][WARM_UP:] for name in ("ours", "inside", "timm", "matmul"))
    batch = CASES[case][2]
    peaks = [2 * MATMUL**3 / product for product in matmul]
    return {
        "case": case,
        "mode": mode,
        "images_per_s": batch / median(ours),
        "timm_images_per_s": batch / median(peer),
        "ratio": median(theirs / own for theirs, own in zip(peer, ours, strict=True)),
        "loop": median(1 - part / own for part, own in zip(inside, ours, strict=True)),
        "share": median(flops / own / peak for own, peak in zip(ours, peaks, strict=True)),
        "timm_share": median(flops / theirs / peak for theirs, peak in zip(peer, peaks, strict=True)),
        "difference": turns.difference,
        "rounds": len(ours),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write all rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    print(f"torch {torch.__version__}, timm {timm.__version__}, {options.device}, {options.threads} threads")
    rows = []
    for case in options.cases.split(","):
        for mode in options.modes.split(","):
            torch.manual_seed(0)
            rows.append(found := measure(case, mode, options.rounds, torch.device(options.device)))
            print(
                f"{case:6} {mode:5} {found['images_per_s']:8.1f} images/s, timm {found['timm_images_per_s']:8.1f}: "
                f"x{found['ratio']:.3f}  loop {found['loop']:.2%}  share of peak {found['share']:.0%} "
                f"(timm {found['timm_share']:.0%})  greatest difference {found['difference']:.1e}"
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
