import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import onnxruntime
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.export import Dim
from torch.nn import functional as F
from vitreg_core import Features, VisionTransformer, ViTConfig, export_onnx
from vitreg_core.config import override
from vitreg_core.embed import resize_by_products, resize_positions
from vitreg_core.errors import InputError

TINY = ViTConfig(image_size=56, patch_size=14, embed_dim=24, depth=1, num_heads=3, registers=2, layer_scale=0.1)
SHAPES = {
    "size": {"num_classes": 5, "class_position": True},
    "offset": {"position_antialias": False, "position_offset": 0.1, "registers": 0, "feed_forward": "swiglu"},
    "rope": {"position": "rope", "qk_norm": True, "class_token": False, "pool": "avg", "pre_norm": True},
}
SIZES = {
    "native": (56, 56),
    "224": (224, 224),
    "not square": (84, 126),
    "not divided": (59, 100),
    "one row side": (56, 83),
}


def tiny(**changes: object) -> VisionTransformer:
    model = VisionTransformer(override(TINY, changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the published models' positions and registers are not small either
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Leave out the shape checks: symbolic sizes are no ints."""
    jaxtyping.config.update("jaxtyping_disable", True)  # noqa: FBT003
    yield
    jaxtyping.config.update("jaxtyping_disable", False)  # noqa: FBT003


GRIDS = [(1, 1), (2, 3), (7, 7), (16, 16), (16, 40), (37, 37), (50, 23), (14, 9), (9, 14), (37, 5)]


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("native", [(16, 16), (37, 37), (14, 9), (3, 3), (1, 4), (2, 1)])
def test_the_resize_by_products_equals_torch(native: tuple[int, int], *, antialias: bool, offset: float) -> None:
    table = 0.1 * torch.randn(native[0] * native[1], 4)
    image = table.view(1, *native, 4).permute(0, 3, 1, 2)
    for grid in GRIDS:
        scale = [(new + offset) / old for new, old in zip(grid, native, strict=True)]
        how = {"scale_factor": scale} if offset else {"size": grid}
        theirs = image if grid == native else F.interpolate(image, mode="bicubic", antialias=antialias, **how)
        ours = resize_by_products(table, native, grid, antialias=antialias, offset=offset)
        torch.testing.assert_close(ours, theirs[0].flatten(1).T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("antialias", [True, False])
def test_the_resize_by_products_leaves_the_native_grid_bit_by_bit(*, antialias: bool, offset: float) -> None:
    table = torch.randn(37 * 16, 4)
    assert torch.equal(resize_by_products(table, (37, 16), (37, 16), antialias=antialias, offset=offset), table)


def test_eager_models_keep_the_kernel_of_the_peers() -> None:
    table = torch.randn(16 * 16, 4)
    theirs = F.interpolate(table.view(1, 16, 16, 4).permute(0, 3, 1, 2), size=(7, 9), mode="bicubic", antialias=True)
    ours = resize_positions(table, (16, 16), (7, 9), antialias=True, offset=0.0)
    assert torch.equal(ours, theirs[0].flatten(1).T)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_exported_programs_follow_batch_height_and_width(changes: dict, tmp_path: Path) -> None:
    model = tiny(**changes)
    dynamic = {0: Dim("batch"), 2: Dim("height", min=28), 3: Dim("width", min=28)}
    exported = torch.export.export(model, (torch.randn(2, 3, 70, 45),), dynamic_shapes=(dynamic,))
    torch.export.save(exported, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch, size in zip((1, 2, 3, 1, 2), SIZES.values(), strict=True):
        images = torch.randn(batch, 3, *size)
        ours, theirs = program(images), model(images)
        assert isinstance(ours, Features)
        assert ours.grid == theirs.grid == (size[0] // 14, size[1] // 14)
        assert (ours.cls is None) == (theirs.cls is None)
        torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.filterwarnings("ignore:.*(LeafSpec|deprecated).*")
@torch.no_grad()
def test_onnxruntime_equals_torch(changes: dict, tmp_path: Path) -> None:
    model = tiny(**changes)
    model.source = "somewhere"
    export_onnx(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for batch, size in zip((1, 2, 3, 1, 2), SIZES.values(), strict=True):
        images = torch.randn(batch, 3, *size)
        outputs = dict(zip(names, map(torch.from_numpy, session.run(names, {"images": images.numpy()})), strict=True))
        features = model(images)
        expected = {"cls": features.cls, "registers": features.registers, "patches": features.patches}
        expected = {name: value for name, value in expected.items() if value is not None and value.numel()}
        if model.head is not None:
            expected["logits"] = model.classify(images)
        torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-4)
    held = session.get_modelmeta().custom_metadata_map
    assert (held["source"], held["patch_size"]) == ("somewhere", "14")
    assert json.loads(held["preprocess"])["image_size"] == 56


def test_onnx_refuses_what_the_file_would_not_compute(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model \(unnamed\) is in training mode; call model\.eval\(\) first"):
        export_onnx(tiny().train(), tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"model in torch\.bfloat16 would differ from it; call model\.float\(\) first"):
        export_onnx(tiny().bfloat16(), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="missing: no such folder; give a folder that exists"):
        export_onnx(tiny(), tmp_path / "missing" / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_onnx_names_the_extra_to_install(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"needs {missing}; install it with: pip install 'vitreg-core\[export\]'"):
        export_onnx(tiny(), tmp_path / "model.onnx")


def gradients(model: VisionTransformer, *, packed: bool, autocast: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a pass with fixed dropped paths, and the bytes kept for the backward pass."""
    torch.manual_seed(1)
    batches = [torch.randn(4, 3, 56, 56), torch.randn(3, 3, 28, 42)]
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model.packed(batches) if packed else [model(batches[0])]
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    model.zero_grad()
    sum(features.tokens.float().square().sum() for features in outputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stochastic_depth", ["sample", "subset"])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(
    stochastic_depth: str, *, packed: bool, autocast: bool
) -> None:
    model = tiny(drop_path=0.4, stochastic_depth=stochastic_depth, depth=4, position="rope").train()
    plain, all_bytes = gradients(model, packed=packed, autocast=autocast)
    model.set_grad_checkpointing(True)
    checkpointed, fewer_bytes = gradients(model, packed=packed, autocast=autocast)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    assert fewer_bytes < 0.6 * all_bytes


SHARDED = """
import multiprocessing, os, sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from vitreg_core import VisionTransformer, ViTConfig

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, registers=3, layer_scale=0.1)

def work(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    plain, sharded = VisionTransformer(CONFIG), VisionTransformer(CONFIG)
    sharded.load_state_dict(plain.state_dict())
    mesh = init_device_mesh("cpu", (2,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    register_fsdp_forward_method(sharded, "packed")
    images = torch.randn(4, 3, 40, 32)
    for packed in (False, True):
        plain.zero_grad(), sharded.zero_grad()
        mine = images[2 * rank : 2 * rank + 2]
        whole = plain.packed([images, images[..., :16]])[1] if packed else plain(images)
        part = sharded.packed([mine, mine[..., :16]])[1] if packed else sharded(mine)
        torch.testing.assert_close(part.tokens, whole.tokens[2 * rank : 2 * rank + 2], rtol=0, atol=1e-6)
        whole.tokens.square().mean().backward(), part.tokens.square().mean().backward()
        compared = 0
        for (name, ours), theirs in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            assert ours.to_local().numel() < ours.numel(), name
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-6)
                compared += 1
        assert compared >= len(list(plain.blocks.parameters()))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)

context = multiprocessing.get_context("fork")
ranks = [context.Process(target=work, args=(rank,)) for rank in range(2)]
[process.start() for process in ranks]
[process.join() for process in ranks]
sys.exit(max(process.exitcode for process in ranks))
"""


def test_blocks_shard_over_two_processes_with_equal_outputs_and_gradients(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHARDED, str(tmp_path / "store")],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
