"""What only a CUDA device can show: the xFormers kernels against torch's attention, and the model on the device."""

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from vitreg_core import VisionTransformer, ViTConfig
from vitreg_core import attention as kernels
from vitreg_core.attention import QKV, attend, attend_packed, xformers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_xformers = pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="needs the extra xformers")

CONFIG = ViTConfig(image_size=56, patch_size=14, embed_dim=128, depth=2, num_heads=2, registers=4, layer_scale=0.5)
TOLERANCE = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def parts(images: int, tokens: int, dtype: torch.dtype) -> QKV:
    return QKV(*(torch.randn(images, 2, tokens, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)))


def exact(batch: QKV) -> Tensor:
    return F.scaled_dot_product_attention(*(part.double() for part in (batch.queries, batch.keys, batch.values)))


@needs_xformers
def test_xformers_is_used_on_the_device() -> None:
    assert xformers() is not None


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_on_the_device_is_exact(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = parts(3, 261, dtype)
    torch.testing.assert_close(attend(batch).double(), exact(batch), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packed_attention_keeps_images_apart_and_so_do_its_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batches = [parts(2, 261, dtype), parts(8, 54, dtype)]
    mixed = attend_packed(batches)
    wanted = torch.cat([exact(batch).transpose(1, 2).reshape(1, -1, 128) for batch in batches], dim=1)
    torch.testing.assert_close(mixed.double(), wanted, rtol=0, atol=TOLERANCE[dtype])
    inputs = [part for batch in batches for part in (batch.queries, batch.keys, batch.values)]
    mine = torch.autograd.grad(mixed.float().square().sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad(wanted.square().sum(), inputs)
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).norm() <= 4 * TOLERANCE[dtype] * other.norm()


def test_the_device_gives_what_the_cpu_gives() -> None:
    torch.manual_seed(0)
    model, images = VisionTransformer(CONFIG).eval(), torch.randn(2, 3, 56, 70)
    with torch.no_grad():
        expected = model(images).tokens
        found = model.cuda()(images.cuda()).tokens.cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_without_xformers_torch_attention_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(CONFIG).eval().cuda()
    batches = [torch.randn(2, 3, 56, 56, device="cuda"), torch.randn(3, 3, 28, 28, device="cuda")]
    with torch.no_grad():
        expected = [features.tokens for features in model.packed(batches)]
        monkeypatch.setattr(kernels, "xformers", lambda: None)
        found = [features.tokens for features in model.packed(batches)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


def test_a_compiled_model_on_the_device_is_exact() -> None:
    torch.manual_seed(0)
    model, images = VisionTransformer(CONFIG).eval().cuda(), torch.randn(2, 3, 56, 56, device="cuda")
    with torch.no_grad():
        compiled = torch.compile(model.forward_features, fullgraph=True)(images)
        torch.testing.assert_close(compiled, model.forward_features(images), rtol=0, atol=2e-3)
