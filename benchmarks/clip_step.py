"""Contrastive training step: our loop against open_clip's own model and loss, in turn, from the same weights.

    python benchmarks/clip_step.py [--cases small,s16,b16] [--modes fp32,bf16] [--rounds 9] [--threads 2]
                                   [--device cpu] [--json FILE]

Ours is `vitreg_recipes.train` itself, with log, checkpoint, stop and progress hooks, on batches that lie in memory; the
peer's step runs inside a hook, on the batch that ours has just seen: open_clip's `CLIP`, its `ClipLoss`, AdamW over its
two groups, the clamp of the logit scale, and Accelerate's `prepare` and `backward`, without hooks, schedule and log. In
every round both run once, so that a ratio compares neighbours in time; ratios are medians over the rounds. Features are
compared in fp32 before the first round; the greatest difference is printed.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import open_clip
import torch
from accelerate.state import AcceleratorState
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import AdamW
from vitreg_core.clip import DualEncoder
from vitreg_core.clip_config import CLIP_MEAN, CLIP_STD, TextConfig, clip_vision
from vitreg_core.config import PreprocessConfig, ViTConfig, override
from vitreg_recipes import find, train
from vitreg_recipes.contrast.data import Pairs
from vitreg_recipes.data import Share
from vitreg_recipes.signals import contrast
from vitreg_recipes.state import TrainState

CASES = {  # image tower, text tower, batch
    "small": (
        clip_vision(image_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=64),
        TextConfig(context_length=32, width=64, heads=2, layers=2),
        64,
    ),
    "s16": (
        clip_vision(embed_dim=384, num_heads=6, num_classes=384),
        TextConfig(width=384, heads=6, layers=12),
        16,
    ),
    "b16": (clip_vision(), TextConfig(), 32),
}
MODES = ("fp32", "bf16")
WARM_UP = 2


class FixedPairs:
    """One batch in memory, again and again."""

    def __init__(self, vision: ViTConfig, text: TextConfig, batch: int, device: torch.device) -> None:
        size = vision.size[0]
        self.classes: list[str] = []
        self.images = 0
        self.skipped: set[str] = set()
        self.preprocess = PreprocessConfig(image_size=size, mean=CLIP_MEAN, std=CLIP_STD)
        tokens = torch.randint(1, 40_000, (batch, text.context_length), device=device)
        tokens[:, -1] = text.vocab_size - 1  # the end, which has the greatest number
        self.batch = Pairs(torch.randn(batch, 3, size, size, device=device), tokens)

    def epoch_steps(self, _share: Share) -> int:
        """Steps of an epoch."""
        return 1000

    def batches(self, _step: int, _share: Share, _device: torch.device) -> Iterator[Pairs]:
        """Yield the batch without end."""
        while True:
            yield self.batch


class Peer:
    """The loop that users of open_clip and Accelerate write."""

    def __init__(self, state: TrainState, vision: ViTConfig, text: TextConfig) -> None:
        self.model = their_model(vision, text)
        named = list(self.model.named_parameters())
        spared = [p for name, p in named if p.ndim < 2 or any(w in name for w in ("bn", "ln", "bias", "logit_scale"))]
        kept = {id(p) for p in spared}
        decayed = [p for _, p in named if id(p) not in kept]
        groups = [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
        optimizer = AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6)
        self.accelerator = state.accelerator
        self.network, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.loss = open_clip.ClipLoss(local_loss=True, gather_with_grad=True)

    def step(self, batch: Pairs) -> None:
        """One training step."""
        self.network.train()
        self.optimizer.zero_grad()
        found = self.network(batch.images, batch.tokens)
        self.accelerator.backward(self.loss(**found))
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))


def their_model(vision: ViTConfig, text: TextConfig) -> CLIP:
    """open_clip's model of the same shapes."""
    image = CLIPVisionCfg(
        layers=vision.depth,
        width=vision.embed_dim,
        head_width=vision.embed_dim // vision.num_heads,
        patch_size=vision.patch_size,
        image_size=vision.size[0],
    )
    words = CLIPTextCfg(context_length=text.context_length, width=text.width, heads=text.heads, layers=text.layers)
    return CLIP(vision.num_classes, image, words, output_dict=True)


@torch.no_grad()
def check(ours: DualEncoder, theirs: CLIP, batch: Pairs) -> float:
    """Copy our weights to the peer; greatest difference of the features, in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        ours.export(Path(folder))
        theirs.load_state_dict(load_file(Path(folder, "open_clip_model.safetensors")))
    ours.eval(), theirs.eval()
    images, tokens = batch.images[:2], batch.tokens[:2]
    mine = (ours.encode_image(images), ours.encode_text(tokens))
    peers = (CLIP.encode_image(theirs, images), CLIP.encode_text(theirs, tokens))
    return max((a - b).abs().max().item() for a, b in zip(mine, peers, strict=True))


class Turns:
    """A hook of our loop: notes how long our step took, then runs the peer's."""

    def __init__(self, case: str, data: FixedPairs) -> None:
        self.shapes = CASES[case][:2]
        self.data = data
        self.peer: Peer | None = None
        self.difference = 0.0
        self.times: dict[str, list[float]] = {"ours": [], "open_clip": []}
        self.began = 0.0

    def __call__(self, state: TrainState, _metrics: Mapping[str, Tensor]) -> None:
        """Run both once in turn."""
        if self.peer is None:
            self.peer = Peer(state, *self.shapes)
            model = state.model
            assert isinstance(model, DualEncoder)
            self.difference = check(model, self.peer.model, self.data.batch)
        else:
            peer = self.peer
            self.times["ours"].append(self.clock() - self.began)
            self.times["open_clip"].append(self.seconds(lambda: peer.step(self.data.batch)))
        self.began = self.clock()

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
    vision, text, batch = CASES[case]
    AcceleratorState._reset_state(reset_partial_state=True)
    data = FixedPairs(vision, text, batch, device)
    contrast.open_pairs = lambda _config: data  # type: ignore[attr-defined, assignment]
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "model": vision.model_dump(),
            "text": text.model_dump(),
            "data.batch_size": batch,
            "steps": WARM_UP + rounds + 1,
            "optim.warmup_steps": 0,
            "optim.clip": None,
            "precision": mode,
            "save_every": 10**6,
            "log_every": 10**6,
            "out": folder,
        }
        turns = Turns(case, data)
        train(override(find("openclip_scenes"), changes), hooks=[turns])
    ours, theirs = (turns.times[name][WARM_UP:] for name in ("ours", "open_clip"))
    return {
        "case": case,
        "mode": mode,
        "images_per_s": batch / median(ours),
        "open_clip_images_per_s": batch / median(theirs),
        "ratio": median(their / own for their, own in zip(theirs, ours, strict=True)),
        "difference": turns.difference,
        "rounds": len(ours),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="small,s16")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write all rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    print(f"torch {torch.__version__}, open_clip {open_clip.__version__}, {options.device}, {options.threads} threads")
    rows = []
    for case in options.cases.split(","):
        for mode in options.modes.split(","):
            torch.manual_seed(0)
            rows.append(found := measure(case, mode, options.rounds, torch.device(options.device)))
            print(
                f"{case:6} {mode:5} {found['images_per_s']:8.1f} images/s, open_clip "
                f"{found['open_clip_images_per_s']:8.1f}: x{found['ratio']:.3f}  greatest difference "
                f"{found['difference']:.1e}"
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
