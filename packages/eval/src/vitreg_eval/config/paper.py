"""Options of the command that makes the paper's tables."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt
from vitreg_core.config import Config

Table = Literal["table1", "table2a", "table2b", "table3", "samples"]
TABLES: dict[str, str] = {
    "table1": "classification from one token: class, normal, outlier",
    "table2a": "linear probing, segmentation, depth",
    "table2b": "zero-shot classification",
    "table3": "object discovery with LOST",
    "samples": "everything on the sample data, for a first look",
}


class PaperOptions(Config):
    """A table of Darcet et al. 2024, measured on your models, beside the published values.

    What cannot be measured (a data set that is not there, a model without what a task reads) is listed, and the rest is
    measured. What is done is not measured again, so that the same command goes on after a kill.
    """

    table: Table | None = None
    """Which table; the first word of the command."""
    model: tuple[str, ...] = ()
    """SOURCE of a model. Repeat for several."""
    data: Path | None = None
    """Folder that holds the data sets, each in its official layout; $VITREG_DATA if not given."""
    out: Path | None = None
    """Folder for the table and all results; runs/paper/<table> if not given."""
    protocol: Literal["dinov2", "cached"] = "dinov2"
    """Train heads with augmentation as DINOv2 does, or on features computed once (other numbers, far faster)."""
    steps: PositiveInt | None = None
    """Optimizer steps of each head; as the protocol has it if not given."""
    features: Literal["keys", "queries", "values"] | None = None
    """What LOST reads (the paper: keys for DINOv2, values for DeiT-III and OpenCLIP); the task's own if not given."""
    cache: Path | None = None
    """Folder that keeps features between commands."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Where to compute; the fastest there is if not given."""
    precision: Literal["fp32", "fp32-fast", "bf16"] = "fp32"
    """Exact float32, faster float32 products, or bfloat16."""
    batch_size: PositiveInt = 64
    """Images per forward pass, other than those that heads train on."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of heads, choices and bootstrap."""

    def needs(self) -> list[str]:
        """What must still be given before anything is loaded, one phrase each."""
        missing = [] if self.table else [f"the table, one of {', '.join(TABLES)}"]
        missing += [] if self.model else ["--model SOURCE"]
        there = self.data or os.environ.get("VITREG_DATA")
        return [*missing, *([] if there else ["--data DIR, the folder that holds the data sets (or set VITREG_DATA)"])]
