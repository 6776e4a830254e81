"""Self-supervised step: ours against a plain one of timm's ViT and lightly's losses, in turn, from equal weights.

    python benchmarks/dinov2_step.py [--sizes s] [--modes fp32,bf16] [--batch 8] [--rounds 5] [--threads 1]
                                     [--drop_path 0] [--device cpu] [--json FILE]

A step has 2 global crops of 224 pixels and 8 local ones of 96 per image, patches of 16, softmax centering, one head of
4,096 prototypes, DINO's, iBOT's and KoLeo's loss, clipping by network, AdamW, and the teacher's moving average. Ours is
`vitreg_recipes.train` itself, with its hooks, on crops that lie in memory; the peer's step runs inside a hook, on the
crops that ours has just seen. The peer is lightly's masked ViT around timm's, its DINO head and its three losses; a
forward pass of the student for each resolution.
In every round both run once. On the CPU times are CPU time, so that other work on the machine counts little; on a GPU
wall time, with peak memory of either, and the share of the GPU's peak in matrix products of our step (MFU).
Both losses are computed of the same weights before the rounds; their greatest difference over the sum is printed.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from vitreg_core import save_model
from vitreg_core.config import PreprocessConfig, override
from vitreg_recipes import find, loop
from vitreg_recipes.data import Share
from vitreg_recipes.dinov2.config import DinoConfig
from vitreg_recipes.dinov2.crops import Crops
from vitreg_recipes.dinov2.losses import masked_weights
from vitreg_recipes.dinov2.targets import Center
from vitreg_recipes.objectives.dinov2 import Dinov2
from vitreg_recipes.plan import GPUS, step_flops
from vitreg_recipes.signals import dinov2
from vitreg_recipes.state import TrainState

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import update_momentum

SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}
MODES = ("fp32", "bf16")
PROTOTYPES = 4096
MASKED = 0.3
"""Share of the patches of every second global crop that are masked: the middle of DINOv2's ratios."""
WARM_UP = 1


class FixedData:
    """Crops in memory, again and again."""

    def __init__(self, config: DinoConfig, device: torch.device) -> None:
        images, size, local = config.data.batch_size, config.model.size[0], config.data.local_size
        self.classes: list[str] = []
        self.images = 0
        self.preprocess = PreprocessConfig(image_size=size)
        self.skipped: set[str] = set()
        patches = config.model.grid[0] * config.model.grid[1]
        masks = torch.zeros(2 * images, patches, dtype=torch.bool, device=device)
        masks[::2, : int(MASKED * patches)] = True
        self.batch = Crops(
            torch.randn(2 * images, 3, size, size, device=device),
            torch.randn(config.data.local_crops * images, 3, local, local, device=device),
            masks,
        )

    def epoch_steps(self, _share: Share) -> int:
        """Steps of an epoch."""
        return 1000

    def batches(self, _step: int, _share: Share, _device: torch.device) -> Iterator[Crops]:
        """Yield the crops without end."""
        while True:
            yield self.batch


class PeerNetwork(nn.Module):
    """A backbone and a head."""

    def __init__(self, config: DinoConfig, drop_path: float) -> None:
        super().__init__()
        model, head = config.model, config.head
        vit: Any = timm.models.vision_transformer.VisionTransformer(
            img_size=model.size,
            patch_size=model.patch_size,
            num_classes=0,
            embed_dim=model.embed_dim,
            depth=model.depth,
            num_heads=model.num_heads,
            init_values=model.layer_scale,
            dynamic_img_size=True,
        )
        for block in vit.blocks:
            block.drop_path1, block.drop_path2 = DropPath(drop_path), DropPath(drop_path)
        self.backbone = MaskedVisionTransformerTIMM(vit, antialias=True)
        self.head = DINOProjectionHead(
            model.embed_dim, head.hidden, head.bottleneck, head.prototypes, norm_last_layer=False
        )


class Peer:
    """The loop that users of timm and lightly write."""

    def __init__(self, state: TrainState) -> None:
        config = state.config
        assert isinstance(config, DinoConfig)
        device = state.accelerator.device
        self.accelerator = state.accelerator
        self.student = PeerNetwork(config, config.model.drop_path).to(device)
        self.teacher = PeerNetwork(config, 0.0).to(device).eval().requires_grad_(False)  # noqa: FBT003
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        self.dino = DINOLoss(config.head.prototypes, teacher_temp=0.04).to(device)
        self.ibot = IBOTPatchLoss(config.head.prototypes, teacher_temp=0.04).to(device)
        self.koleo = KoLeoLoss()
        self.clip = config.optim.clip
        self.grid = config.model.grid

    def loss(self, batch: Crops) -> Tensor:
        """Forward pass."""
        masks = batch.masks.unflatten(1, self.grid)
        whole = torch.cat([batch.masks.new_zeros(len(masks), 1), batch.masks], dim=1)
        with torch.no_grad(), self.accelerator.autocast():
            seen = self.teacher.backbone.encode(batch.global_crops)
            taught = self.teacher.head(seen[:, 0])
            taught_patches = self.teacher.head(seen[whole])
        with self.accelerator.autocast():
            tokens = self.student.backbone.encode(batch.global_crops, mask=whole)
            large = self.student.head(tokens[:, 0])
            patches = self.student.head(tokens[whole])
            small = self.student.head(self.student.backbone.encode(batch.local_crops)[:, 0])
        crops = len(batch.local_crops) // (len(masks) // 2)
        views = [*large.float().chunk(2), *small.float().chunk(crops)]
        dino = self.dino(list(taught.float().chunk(2)), views)
        ibot = self.ibot(taught_patches.float(), patches.float(), masks)
        koleo = sum(self.koleo(part.float()) for part in tokens[:, 0].chunk(2))
        return dino + ibot + 0.1 * koleo

    def step(self, batch: Crops) -> None:
        """One training step."""
        self.student.train()
        self.accelerator.backward(self.loss(batch))
        for part in self.student.children():
            clip_grad_norm_(part.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_momentum(self.student, self.teacher, 0.992)


def same_weights(objective: Dinov2, peer: Peer) -> None:
    """Copy our student to the peer's student and teacher, and our teacher's weights likewise."""
    for ours, theirs in ((objective.student, peer.student), (objective.teacher, peer.teacher)):
        with tempfile.TemporaryDirectory() as folder:
            save_model(ours.backbone, Path(folder), layout="timm")
            tensors = load_file(Path(folder, "model.safetensors"))
            theirs.backbone.vit.load_state_dict(
                {name: value for name, value in tensors.items() if name != "mask_token"}
            )
        with torch.no_grad():
            assert ours.backbone.mask_token is not None
            theirs.backbone.mask_token.copy_(ours.backbone.mask_token.reshape(1, 1, -1))
            for target, source in zip(theirs.head.parameters(), ours.dino_head.parameters(), strict=True):
                target.copy_(source.reshape(target.shape))


class Turns:
    """A hook of our loop: notes how long our step took, then runs the peer's."""

    def __init__(self, data: FixedData) -> None:
        self.data = data
        self.peer: Peer | None = None
        self.difference = 0.0
        self.times: dict[str, list[float]] = {name: [] for name in ("ours", "plain")}
        self.memory = {"ours": 0.0, "plain": 0.0}
        self.began = 0.0

    def __call__(self, state: TrainState, _metrics: Mapping[str, Tensor]) -> None:
        """Run the peer, if our step was a timed one."""
        if self.peer is None:
            self.start(state)
        else:
            self.times["ours"].append(self.clock() - self.began)
            self.memory["ours"] = self.peak()
            self.times["plain"].append(self.seconds(lambda: self.peer.step(self.data.batch)))  # type: ignore[union-attr]
            self.memory["plain"] = self.peak()
        self.began = self.clock()

    def start(self, state: TrainState) -> None:
        """Build the peer, and compare the losses."""
        objective = state.objective
        assert isinstance(objective, Dinov2)
        self.peer = Peer(state)
        same_weights(objective, self.peer)
        objective.student.eval(), self.peer.student.eval()
        assert isinstance(objective.cls_targets, Center)
        self.peer.dino.center.copy_(objective.cls_targets.center[None])
        assert isinstance(objective.patch_targets, Center)
        self.peer.ibot.center.center.copy_(objective.patch_targets.center)
        with torch.no_grad():
            masked, weights = masked_weights(self.data.batch.masks)
            cls, patches, _ = objective.targets(self.data.batch, masked)
            with state.accelerator.autocast():
                judged = objective.student(self.data.batch, masked)
            ours = torch.stack(list(objective.terms(self.data.batch, judged, cls, patches, weights).values())).sum()
            self.difference = abs(1 - float(self.peer.loss(self.data.batch) / ours))

    def peak(self) -> float:
        """Peak memory in 1e9 bytes since the last look, on a GPU."""
        if not self.data.batch.images.is_cuda:
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak

    def seconds(self, run: Callable[[], object]) -> float:
        """Time that something takes."""
        start = self.clock()
        run()
        return self.clock() - start

    def clock(self) -> float:
        """Seconds: of this process on the CPU, of the wall once the GPU has done what it was asked."""
        if self.data.batch.images.is_cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def configure(size: str, mode: str, options: argparse.Namespace, folder: str) -> DinoConfig:
    """The run of a case."""
    width, depth, heads = SIZES[size]
    changes = {
        "model.embed_dim": width,
        "model.depth": depth,
        "model.num_heads": heads,
        "model.drop_path": options.drop_path,
        "model.position_antialias": True,
        "model.position_offset": 0.0,
        "model.layer_scale": 1e-1,
        "head.prototypes": PROTOTYPES,
        "data.batch_size": options.batch,
        "teacher.temperature": (0.04, 0.04),
        "optim.warmup_steps": 0,
        "steps": WARM_UP + options.rounds + 1,
        "precision": mode,
        "save_every": 10**6,
        "snapshot_every": None,
        "norms_every": None,
        "out": folder,
    }
    config = override(find("dinov2_l16_short"), changes)
    assert isinstance(config, DinoConfig)
    return config


def measure(size: str, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps and compare."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with tempfile.TemporaryDirectory() as folder:
        config = configure(size, mode, options, folder)
        turns = Turns(FixedData(config, torch.device(options.device)))
        dinov2.CropData = lambda _config: turns.data  # type: ignore[attr-defined, assignment, return-value]
        loop.train(config, hooks=[turns])
    ours, plain = (turns.times[name][WARM_UP:] for name in ("ours", "plain"))
    return {
        "size": size,
        "mode": mode,
        "images_per_s": options.batch / median(ours),
        "plain_images_per_s": options.batch / median(plain),
        "ratio": median(theirs / own for theirs, own in zip(plain, ours, strict=True)),
        "difference": turns.difference,
        "memory": turns.memory,
        "tflops": step_flops(config) * options.batch / median(ours) / 1e12,
        "rounds": len(ours),
    }


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="s")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--drop_path", type=float, default=0.0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="whose peak counts for the MFU")
    parser.add_argument("--json", type=Path, help="write all rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    print(f"torch {torch.__version__}, timm {timm.__version__}, {options.device}, {options.threads} threads")
    rows = []
    for size in options.sizes.split(","):
        for mode in options.modes.split(","):
            torch.manual_seed(0)
            rows.append(found := measure(size, mode, options))
            gpu = (
                f", peak {found['memory']['ours']:.1f} against {found['memory']['plain']:.1f} GB, MFU "
                f"{found['tflops'] / GPUS[options.gpu].teraflops:.0%}"
                if options.device == "cuda"
                else ""
            )
            print(
                f"{size}16 {mode:5} batch {options.batch} {found['images_per_s']:7.2f} images/s, plain "
                f"{found['plain_images_per_s']:7.2f}: x{found['ratio']:.3f}  losses differ by "
                f"{found['difference']:.1e}{gpu}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
