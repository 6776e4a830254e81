"""Compilation, in processes of their own: the shape checks of a test run are no part of a model's graph."""

import os
import subprocess
import sys

START = """
import sys
import torch
from torch._dynamo import mark_dynamic
from torch._dynamo.testing import CompileCounter
from vitreg_core import VisionTransformer, ViTConfig

torch.set_num_threads(1)
torch.manual_seed(0)
TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "registers": 2}
SHAPES = [
    {"class_position": True, "layer_scale": 0.1},
    {"position": "rope", "qk_norm": True},
    {"class_token": False, "pool": "avg", "feed_forward": "swiglu", "position_offset": 0.1},
]


def images(batch, height=48, width=40):
    values = torch.randn(batch, 3, height, width)
    mark_dynamic(values, 0)
    return values


def assert_equal(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grid == other.grid
        torch.testing.assert_close(mine.tokens, other.tokens, rtol=0, atol=1e-5)
"""

GRAPHS = """
def count_compiles(call, inputs, batches):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for batch in batches:
        given = inputs(batch)
        ours, theirs = compiled(*given), call(*given)
        assert_equal(*((ours, theirs) if isinstance(ours, list) else ([ours], [theirs])))
    return counter.frame_count


models = [VisionTransformer(ViTConfig(**TINY, **changes)).eval() for changes in SHAPES]
for model in models:
    once = count_compiles(model, lambda batch: [images(batch)], (3, 5, 2))
    assert once == 1, f"{model.config}: compiled {once} times"

learned, rotary, _ = models
once = count_compiles(rotary.packed, lambda batch: [[images(batch), images(batch + 2, 32, 32)]], (3, 5, 2))
assert once == 1, f"packed: compiled {once} times"
once = count_compiles(lambda x: learned.intermediate(x, [0, -1]), lambda batch: [images(batch)], (3, 5, 2))
assert once == 1, f"intermediate: compiled {once} times"

unmarked = count_compiles(learned, lambda batch: [torch.randn(batch, 3, 48, 40)], (3, 5, 2, 1, 4, 1))
assert unmarked == 3, f"for the first batch, for any batch, for a batch of one: but compiled {unmarked} times"
"""

TRAINING = """
for stochastic_depth, checkpointing in (("sample", True), ("subset", False)):
    torch._dynamo.reset()
    config = ViTConfig(**TINY, drop_path=0.3, stochastic_depth=stochastic_depth)
    model = VisionTransformer(config).train()
    model.set_grad_checkpointing(checkpointing)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (9, 5, 7):
        compiled(images(batch)).tokens.square().mean().backward()
    assert counter.frame_count == 1, f"{stochastic_depth}: compiled {counter.frame_count} times"
    assert all(p.grad.isfinite().all() for p in model.blocks.parameters())
"""

INDUCTOR = """
model = VisionTransformer(ViTConfig(**TINY, feed_forward="swiglu")).eval()
with torch.no_grad():
    given = images(3)
    assert_equal([torch.compile(model, fullgraph=True)(given)], [model(given)])
"""


def run(script: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", START + script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_inference_and_training_are_one_graph_each_compiled_once_for_all_batches() -> None:
    run(GRAPHS + TRAINING)


def test_the_compiled_model_equals_the_eager_one() -> None:
    run(INDUCTOR)
