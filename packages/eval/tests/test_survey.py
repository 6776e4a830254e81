"""The pass over the images: what it keeps is what the model gives, over stops, several processes and broken photos."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from vitreg_core import create_model
from vitreg_core.errors import InputError
from vitreg_core.vit import VisionTransformer
from vitreg_eval import store, survey
from vitreg_eval.config import DoctorOptions
from vitreg_eval.datasets import TolerantSet, scenes
from vitreg_eval.survey import Survey

COUNT = 150
"""Three shards of at most 64."""
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path({tests!r})))
import test_survey
found = test_survey.survey_of(test_survey.small(), Path({cache!r}), Path({out!r}))
print("rows", len(found))
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD", 64)


def small() -> VisionTransformer:
    torch.manual_seed(0)
    return create_model("vit_ti16", image_size=64, depth=2, embed_dim=48, registers=2).eval()


def images_of(model: VisionTransformer) -> TolerantSet:
    return TolerantSet(scenes(model.preprocess, COUNT, 0, "test"), [])


def survey_of(model: VisionTransformer, cache: Path | None, folder: Path) -> Survey:
    return survey.survey(model, images_of(model), DoctorOptions(cache=cache, batch_size=32), folder)


def test_records_are_what_the_model_gives(tmp_path: Path) -> None:
    model = small()
    found = survey_of(model, None, tmp_path)
    images = torch.cat([batch.images for batch in images_of(model).images.batches()])
    with torch.no_grad():
        layers = model.intermediate(images, range(2), norm=False)
        norms = torch.stack([layer.tokens.norm(dim=-1) for layer in layers], dim=1)
        attention = model.attention(images, -1).mean(dim=1)[:, :3, 3:]
        facets = model.qkv(images, -1)
        embeddings = model.embeddings(images).unflatten(1, (4, 4))
    spread = found.spread
    assert torch.equal(found.chosen, torch.arange(COUNT))
    torch.testing.assert_close(spread("norms"), norms[..., 3:])
    torch.testing.assert_close(spread("prefix_norms"), norms[..., :3])
    maps = (attention / attention.sum(dim=-1, keepdim=True)).unflatten(-1, (4, 4))
    torch.testing.assert_close(spread("attention"), maps)
    for index, facet in enumerate((facets.queries, facets.keys, facets.values)):
        torch.testing.assert_close(spread("facet_norms")[:, index], facet[:, :, 3:].norm(dim=-1))
    right = F.cosine_similarity(embeddings[:, :, :-1], embeddings[:, :, 1:], dim=-1)
    similarity = spread("input_similarity").unflatten(1, (4, 4))[..., 3]
    torch.testing.assert_close(similarity[:, :, :-1], right)
    assert similarity[:, :, -1].isnan().all()
    torch.testing.assert_close(torch.cat(list(found.pieces("norms"))), norms[..., 3:])


def test_a_stopped_pass_goes_on_and_a_finished_one_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = survey_of(small(), None, tmp_path / "whole")
    seen: list[int] = []
    look = survey.look_at

    def stop(backbone: VisionTransformer, parts: list[str], images: torch.Tensor) -> object:
        seen.append(len(images))
        if sum(seen) > 100:
            raise KeyboardInterrupt
        return look(backbone, parts, images)

    monkeypatch.setattr(survey, "look_at", stop)
    with pytest.raises(KeyboardInterrupt):
        survey_of(small(), None, tmp_path / "stopped")
    seen[:] = [-1000]
    again = survey_of(small(), None, tmp_path / "stopped")
    assert sum(seen) + 1000 == COUNT - 64  # the first shard was there
    for name in ("norms", "attention", "facet_norms"):
        assert torch.equal(again.spread(name), whole.spread(name))
    seen[:] = []
    survey_of(small(), None, tmp_path / "stopped")
    assert not seen


def test_two_processes_share_the_pass(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    script = SCRIPT.format(tests=str(Path(__file__).parent), cache=str(tmp_path / "cache"), out=str(tmp_path / "out"))
    script = "from vitreg_eval import store\nstore.SHARD = 64\n" + script
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [one.communicate(timeout=300)[0].split()[-1] for one in both] == [str(COUNT)] * 2
    shared_found = survey_of(small(), tmp_path / "cache", tmp_path)
    torch.testing.assert_close(shared_found.spread("norms"), survey_of(small(), None, tmp_path / "own").spread("norms"))


def test_several_processes_need_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="give --cache DIR"):
        survey_of(small(), None, tmp_path)


def test_norms_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.block(1).mlp.fc2.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="norms of the model are not finite"):
        survey_of(model, None, tmp_path)


def test_wide_attention_is_taken_in_small_batches() -> None:
    model = small()
    images = torch.zeros(8, 3, 64, 64)
    whole, _ = survey.look(model, "fp32", survey.PARTS, images)
    survey_bytes = survey.ATTENTION_BYTES
    survey.ATTENTION_BYTES = 4 * model.num_heads * 19**2 * 3
    try:
        assert survey.images_at_once(model, images) == 3
        pieces, _ = survey.look(model, "fp32", survey.PARTS, images)
    finally:
        survey.ATTENTION_BYTES = survey_bytes
    torch.testing.assert_close(pieces, whole, equal_nan=True)
