"""Training recipes for vision transformers with registers, through Hugging Face Accelerate.

`find(name)` gives the config of a run, `vitreg_core.config.override` changes fields of it, and `train(config)` trains:

    from vitreg_core.config import override
    from vitreg_recipes import find, train

    model = train(override(find("deit3_scenes"), {"model.registers": 4, "out": "runs/reg4"}))
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitreg_recipes.config import RunConfig as RunConfig
    from vitreg_recipes.config import TrainConfig as TrainConfig
    from vitreg_recipes.loop import train as train
    from vitreg_recipes.runs import find as find
    from vitreg_recipes.runs import list_runs as list_runs

HOMES = {"RunConfig": "config", "TrainConfig": "config", "train": "loop", "find": "runs", "list_runs": "runs"}
__all__ = list(HOMES)


def __getattr__(name: str) -> object:
    """Import a public name at its first use, so that configs and `--help` need no torch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
