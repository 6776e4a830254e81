"""Choosing among settings of LOST: on the data that are reported on (oracle), or on one half for the other (held-out).

The oracle's number is what papers print that chose a bias by hand, and flatters the method. The held-out number does
not: names of the images decide the halves, so that they stay the same for every model.
"""

from collections.abc import Sequence
from hashlib import sha256

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from vitreg_core.errors import InputError

from vitreg_eval.metrics import Metric, measure
from vitreg_eval.search import Setting

ORACLE = "best of {} settings, chosen on the images that it is reported on"
HELD_OUT = "setting chosen on one half of the images (by hash of their names), reported on the other half"


def meets(boxes: Int[Tensor, "s 4"], true: Int[Tensor, "n 4"]) -> Bool[Tensor, " s"]:
    """Whether each box overlaps any true one with an IoU of 0.5 or more, decided in whole numbers."""
    first = torch.maximum(boxes[:, None, :2], true[None, :, :2])
    last = torch.minimum(boxes[:, None, 2:], true[None, :, 2:])
    shared = (last - first).clamp(min=0).prod(dim=-1)
    union = areas(boxes)[:, None] + areas(true)[None] - shared
    return ((shared > 0) & (2 * shared >= union)).any(dim=1)


def areas(boxes: Int[Tensor, "n 4"]) -> Int[Tensor, " n"]:
    """Pixels in each box."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)


def best(correct: Bool[Tensor, "images settings"]) -> int:
    """The setting with most hits; of equals the first."""
    return int(correct.sum(dim=0).argmax())


def first_half(names: Sequence[str]) -> Bool[Tensor, " images"]:
    """Which images are for choosing: about one half, by the hash of the name."""
    return torch.tensor([sha256(name.encode()).digest()[0] % 2 == 0 for name in names], dtype=torch.bool)


def chosen_metrics(
    names: Sequence[str], correct: Bool[Tensor, "images settings"], seed: int
) -> tuple[dict[str, Metric], dict[str, int]]:
    """CorLoc of both choices, and which setting each is.

    Raises:
        InputError: too few images for two halves.
    """
    choosing = first_half(names)
    if choosing.all() or not choosing.any():
        raise InputError(f"{len(names)} images are too few to choose settings on one half of them; leave out --sweep")
    oracle, held_out = best(correct), best(correct[choosing])
    found = {
        "corloc_oracle": measure(correct[:, oracle], seed=seed),
        "corloc_held_out": measure(correct[~choosing, held_out], seed=seed),
    }
    notes = {"corloc_oracle": ORACLE.format(correct.shape[1]), "corloc_held_out": HELD_OUT}
    metrics = {name: metric.model_copy(update={"note": notes[name]}) for name, metric in found.items()}
    return metrics, {"oracle": oracle, "held-out": held_out}


def curve(settings: Sequence[Setting], correct: Bool[Tensor, "images settings"], seed: int) -> list[dict[str, object]]:
    """CorLoc of every setting, for sweep.json."""
    rows = []
    for index, setting in enumerate(settings):
        found = measure(correct[:, index], seed=seed)
        rows.append({**setting._asdict(), "corloc": found.value, "ci95": found.ci95, "n": found.n})
    return rows


def table(settings: Sequence[Setting], correct: Bool[Tensor, "images settings"]) -> list[str]:
    """CorLoc in percent, a line for each facet and block, a column for each bias."""
    share = (100 * correct.double().mean(dim=0)).tolist()
    by_setting = dict(zip(settings, share, strict=True))
    biases = sorted({setting.bias for setting in settings})
    places = list(dict.fromkeys((setting.features, setting.layer) for setting in settings))
    head = f"{'CorLoc, %':14}" + "".join(f"{bias:8g}" for bias in biases)
    lines = []
    for facet, layer in places:
        cells = (by_setting.get(Setting(layer, facet, bias)) for bias in biases)
        lines.append(f"{f'{facet} {layer}':14}" + "".join(f"{'-':>8}" if c is None else f"{c:8.1f}" for c in cells))
    return [head, *lines]
