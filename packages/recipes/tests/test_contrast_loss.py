"""The contrastive losses against open_clip's, alone and on two processes. As a script, one of two processes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from vitreg_core.clip import Encoded
from vitreg_core.config import override
from vitreg_recipes import find
from vitreg_recipes.contrast.config import ContrastConfig
from vitreg_recipes.contrast.data import Pairs
from vitreg_recipes.contrast.loss import accuracy, clip_loss, siglip_loss
from vitreg_recipes.loop import set_up, start
from vitreg_recipes.objectives.contrast import Contrast

SMALL = {
    "model.image_size": 16,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.depth": 2,
    "model.registers": 2,
    "model.num_classes": 8,
    "text.context_length": 6,
    "text.width": 8,
    "text.layers": 1,
    "data.batch_size": 8,
    "data.workers": 0,
    "optim.warmup_steps": 0,
    "steps": 2,
}
CASES: dict[str, dict[str, object]] = {
    "clip": {},
    "siglip": {"loss": "siglip"},
    "parts": {"accumulate": 2},
    "siglip_parts": {"loss": "siglip", "accumulate": 2},
}


def small(**changes: object) -> ContrastConfig:
    """A run of milliseconds; takes overrides with `__` for dots."""
    config = find("openclip_scenes")
    assert isinstance(config, ContrastConfig)
    return override(config, SMALL | {name.replace("__", "."): value for name, value in changes.items()})


def draw(seed: int, count: int = 8) -> Pairs:
    """Noise and random tokens that end as open_clip's do."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator).to(torch.get_default_dtype())
    tokens = torch.randint(1, 40_000, (count, 6), generator=generator)
    tokens[:, -1] = 49_407
    return Pairs(images, tokens)


def steps_of(config: ContrastConfig, part: slice) -> dict[str, list]:
    """Metrics and gradients of two steps, in double precision, on a part of given batches."""
    torch.set_default_dtype(torch.float64)
    try:
        state = set_up(config, start(config))
        objective, found = state.objective, {"metrics": [], "gradients": []}
        assert isinstance(objective, Contrast)
        for number in range(2):
            batch = draw(number)
            metrics = objective.step(Pairs(batch.images[part], batch.tokens[part]))
            found["metrics"].append({name: state.accelerator.reduce(v.clone(), "mean") for name, v in metrics.items()})
            names = [(name, p) for name, p in objective.model.named_parameters() if p.numel()]
            found["gradients"].append({name: parameter.grad.clone() for name, parameter in names})
            objective.clip()
            state.advance()
            objective.after_step()
    finally:
        torch.set_default_dtype(torch.float32)
    return found


def main(folder: Path) -> None:
    """What each of two processes does."""
    rank = int(os.environ["RANK"])
    for name, values in json.loads((folder / "runs.json").read_text()).items():
        found = steps_of(ContrastConfig(**values), slice(4 * rank, 4 * rank + 4))
        torch.save(found, folder / f"{name}_{rank}.pt")


def test_two_processes_learn_as_one_on_the_joined_batch(tmp_path: Path) -> None:
    configs = {name: small(**changes) for name, changes in CASES.items()}
    values = {name: config.model_dump(mode="json") for name, config in configs.items()}
    (tmp_path / "runs.json").write_text(json.dumps(values))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, config in configs.items():
        whole = steps_of(override(config, {"accumulate": 1}), slice(None))
        for rank, step in itertools.product((0, 1), (0, 1)):
            found = torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True)
            assert found["gradients"][step].keys() == whole["gradients"][step].keys()
            torch.testing.assert_close(found["metrics"][step], whole["metrics"][step], rtol=0, atol=1e-9)
            for parameter, gradient in whole["gradients"][step].items():
                theirs = found["gradients"][step][parameter]
                torch.testing.assert_close(theirs, gradient, rtol=0, atol=1e-9, msg=f"{name} {parameter}")
                assert gradient.any(), parameter


def features(count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        F.normalize(torch.randn(count, 7, generator=generator), dim=1).requires_grad_() for _ in range(2)
    )


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_value_and_gradients_are_open_clips(loss: str) -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    found = []
    for ours in (True, False):
        images, texts = features()
        scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
        if loss == "clip":
            value = clip_loss(Encoded(images, texts), scale)[0] if ours else ClipLoss()(images, texts, scale)
            leaves = [images, texts, scale]
        else:
            encoded = Encoded(images, texts)
            value = siglip_loss(encoded, scale, bias)[0] if ours else SigLipLoss()(images, texts, scale, bias)
            leaves = [images, texts, scale, bias]
        found.append([value, *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_the_logits_tell_which_text_is_nearest() -> None:
    eye = torch.eye(4)
    _, logits = clip_loss(Encoded(eye, eye[[0, 1, 3, 2]]), torch.tensor(5.0))
    torch.testing.assert_close(logits, 5 * eye[[0, 1, 3, 2]])
    assert accuracy(logits) == 0.5
    assert accuracy(siglip_loss(Encoded(eye, eye), torch.tensor(5.0), torch.tensor(-1.0))[1]) == 1.0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
