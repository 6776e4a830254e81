import importlib.util
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vitreg_core import attention, cost
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_recipes import find
from vitreg_recipes.plan import BF16_SHARE, Hardware, parts, plan

APP = Path(__file__).parents[3] / "apps" / "plan.py"
PAGE = Path(__file__).parents[3] / "docs" / "distributed.md"


def test_a_large_model_needs_what_its_shapes_say() -> None:
    found = plan(find("deit3_l16_in22k_90"), Hardware(gpu="a100", gpus=32, mfu=0.5))
    tokens, width, depth = 197, 1024, 24
    products = 2 * tokens * 12 * width**2 * depth + 4 * tokens**2 * width * depth + 2 * 196 * 768 * width
    assert found.flops == 3 * products
    assert found.parameters == 303_349_760 + 1024 * 21_841 + 21_841  # 304 374 760 with 1000 classes
    assert (found.steps, found.images) == (90 * (14_197_122 // 2048), found.steps * 2048)
    assert found.days == pytest.approx(found.images * 3 * products / (32 * 312e12 * 0.5) / 86_400)
    assert found.fixed_bytes == found.parameters * (4 + 4 + 8 + 4 + 2 + 4)
    assert found.share == 64


def test_a_batch_that_does_not_fit_is_split_into_equal_parts() -> None:
    config = override(find("deit3_l16_in22k_90"), {"optim.name": "adamw", "strategy": "ddp"})
    found = plan(config, Hardware(gpu="rtx4090", gpus=8))
    assert found.share % found.accumulate == 0
    assert found.share // found.accumulate <= found.room < found.share // (found.accumulate // 2)
    assert plan(override(config, {"strategy": "fsdp2"}), Hardware(gpu="rtx4090", gpus=8)).room > found.room
    assert (parts(2, 8, 3), parts(2, 8, 1), parts(2, 6, 0)) == (4, 0, 0)  # CutMix takes pairs


@pytest.mark.parametrize("size", [{"embed_dim": 384}, {"embed_dim": 768, "num_heads": 12, "image_size": 384}])
def test_bf16_keeps_the_stated_share(size: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "affords_scores", lambda parts: False)  # as on GPUs, whose kernels keep no scores
    config = override(find("deit3_s16").model, {"depth": 4, **size})
    model = cost.on_meta(config)
    copies = sum(2 * p.numel() for name, p in model.named_parameters() if p.ndim > 1 and name.endswith("weight"))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        saved = cost.saved_bytes(model.to_empty(device="cpu"), torch.empty(1, 3, *config.size))
    assert (saved - copies) / cost.model_cost(config).training_bytes == pytest.approx(BF16_SHARE, rel=0.03)


@pytest.mark.parametrize(
    ("run", "changes", "hardware", "advice"),
    [
        ("deit3_l16_in22k", {}, {"gpus": 7}, "data.batch_size=2048 does not divide by gpus=7; give a divisor"),
        ("deit3_l16_in22k", {"data.path": "photos"}, {"classes": 3}, r"data.path=photos: .* images \(--images N\)"),
        ("deit3_scenes", {}, {}, r"data.path=scenes: give the number of classes \(--classes N\)"),
    ],
)
def test_what_cannot_be_known_is_asked_for(run: str, changes: dict, hardware: dict, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        plan(override(find(run), changes), Hardware(**hardware))


def test_the_program_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    specification = importlib.util.spec_from_file_location("plan_app", APP)
    assert specification is not None
    assert specification.loader is not None
    app = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(app)
    app.main(["deit3_l16_in22k_90", "--gpu", "h100", "--gpus", "8", "--mfu", "0.35"])
    printed = capsys.readouterr().out
    assert f"```text\n{printed}```" in PAGE.read_text()
    assert "35% of the peak (--mfu)" in printed
    with pytest.raises(SystemExit) as stopped:
        app.main(["deit3_l16_in22k", "--mfu", "2"])
    assert stopped.value.code == 2
    assert "plan.py: error: option mfu='2': Input should be less than or equal to 1" in capsys.readouterr().err
    app.main([])
    assert "deit3_l16_in22k" in capsys.readouterr().out
