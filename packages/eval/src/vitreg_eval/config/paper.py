"""Options of the command that makes the figures and tables of the paper and of the study."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt
from vitreg_core.config import Config, nearest
from vitreg_core.errors import InputError

TABLES: dict[str, str] = {
    "table1": "classification from one token: class, normal, outlier",
    "table2a": "linear probing, segmentation, depth",
    "table2b": "zero-shot classification",
    "table3": "object discovery with LOST",
    "study_table1": "object discovery with LOST on VOC 2007",
    "study_table2": "classification from one token, study: tables 2, 4 and 5",
    "samples": "everything on the sample data, for a first look",
}
"""What --data is needed for."""
FIGURES: dict[str, str] = {
    "fig1": "attention of the class token at twice the image size",
    "fig2": "attention of several models, and how peaky it is",
    "fig3": "norms of patch tokens: maps and histogram",
    "fig4a": "norms after every block",
    "fig4b": "norms over training",
    "fig4c": "norms of several model sizes",
    "fig5a": "likeness of neighbouring patches, outliers apart",
    "fig5b": "position and pixels read off normal patches and outliers",
    "fig6": "drawing of the architecture",
    "fig7": "norms with and without registers",
    "fig8": "attention and accuracy by number of registers",
    "fig9": "attention of class token and every register",
    "fig10": "positions of outliers",
    "fig11": "gradient of resized position embeddings",
    "fig12": "parameters and FLOPs by number of registers",
    "fig13": "LOST step by step",
    "fig14": "attention on more images",
    "fig15": "first principal component of patch tokens",
    "fig16": "norm maps on more images",
    "study_fig1": "attention: least peaky, median and peakiest image",
    "study_fig4": "histograms of norms",
    "study_fig5": "norms after every block, with and without registers",
    "study_fig6": "likeness of neighbouring patches",
    "study_fig7": "attention by number of registers",
    "study_fig8": "norms after every block and over training",
    "study_fig9": "attention of class token and registers over training (study: figures 9 and 12)",
    "study_fig10": "positional focus of class token and registers (study: figures 10 and 13)",
    "study_fig11": "likeness of the register maps over training",
    "study_reconstruction": "pixels of a patch by an MLP (study: section 4.2.1)",
    "study_carbon": "energy and emission of the training (study: appendix E)",
}
"""What --images is for."""
ALL = "all"
NAMES = {**FIGURES, **TABLES, ALL: "every figure that can be made from what is given, and with --data every table"}
ALONE = ("fig6", "fig11", "fig12", "study_carbon")
"""Figures that need no model."""
OVER_TRAINING = ("fig4b", "study_fig8", "study_fig9", "study_fig11")
"""Figures that --snapshots alone suffices for."""


def names_text() -> str:
    """All figures and tables, a line each."""
    return "\n".join(f"  {name:21} {line}" for name, line in NAMES.items())


class PaperOptions(Config):
    """A figure or table of Darcet et al. 2024 or of the study of small models, of your models beside published values.

    What cannot be made (a data set that is not there, a model without what a figure reads) is listed, and the rest is
    made. Measurements of tables that are done are not repeated, so that the same command goes on after a kill.
    """

    which: str | None = None
    """Which figure or table, or all; the first word of the command."""
    model: tuple[str, ...] = ()
    """SOURCE of a model, or a run folder with snapshots. Repeat for several."""
    data: Path | None = None
    """Folder that holds the data sets of the tables, each in its official layout; $VITREG_DATA if not given."""
    out: Path | None = None
    """Folder for pictures, tables and all results; runs/paper/<figure or table> if not given."""
    images: Path | None = None
    """Folder of photos for the figures; drawn scenes if not given."""
    limit: PositiveInt | None = None
    """At most this many photos, evenly spread over the folder."""
    test_images: PositiveInt = 1000
    """Scenes for the figures."""
    cutoff: PositiveFloat | None = None
    """A norm of your own above which a token counts, such as the paper's 150; shown beside the rule's, never in its
    place."""
    snapshots: tuple[Path, ...] = ()
    """Model folders of one training, with their steps in their names; those of the run folders in --model if not
    given."""
    results: tuple[Path, ...] = ()
    """result.json of linear, segment or depth, or their folders, for the curves of figure 8."""
    gpus: PositiveInt = 1
    """Accelerators of a training of yours, for the carbon estimate."""
    hours: PositiveFloat | None = None
    """How long it ran; no estimate of yours without."""
    kilowatts: PositiveFloat = 0.4
    """Mean draw of one accelerator."""
    pue: float = Field(default=1.2, ge=1, le=5)
    """Energy of the whole site over that of the machines."""
    intensity: float = Field(default=0.385, ge=0, le=2)
    """Kilograms of CO2 equivalent per kWh."""
    protocol: Literal["dinov2", "cached"] = "dinov2"
    """Train heads with augmentation as DINOv2 does, or on features computed once (other numbers, far faster)."""
    steps: PositiveInt | None = None
    """Optimizer steps of each head; as the protocol has it if not given."""
    features: Literal["keys", "queries", "values"] | None = None
    """What LOST reads (the paper: keys for DINOv2, values for DeiT-III and OpenCLIP); the task's own if not given."""
    cache: Path | None = None
    """Folder that keeps features and records of images between commands."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Where to compute; the fastest there is if not given."""
    precision: Literal["fp32", "fp32-fast", "bf16"] = "fp32"
    """Exact float32, faster float32 products, or bfloat16."""
    batch_size: PositiveInt = 64
    """Images per forward pass, other than those that heads train on."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of scenes, heads, choices and bootstrap."""

    @property
    def has_data(self) -> bool:
        """Whether a folder of data sets is given."""
        return self.data is not None or bool(os.environ.get("VITREG_DATA"))

    def needs(self) -> list[str]:
        """What must still be given before anything is loaded, one phrase each.

        Raises:
            InputError: no such figure or table; names the nearest.
        """
        if self.which is None:
            return [f"the figure or table, one of {', '.join(NAMES)}"]
        if self.which not in NAMES:
            raise InputError(
                f"unknown figure or table {self.which!r}{nearest(self.which, NAMES)}; --help lists all with a line each"
            )
        if self.limit is not None and self.images is None:
            raise InputError(f"--limit {self.limit} without --images; for scenes give --test_images")
        missing = [] if self.has_models else ["--model SOURCE"]
        if self.which in TABLES and not self.has_data:
            missing.append("--data DIR, the folder that holds the data sets (or set VITREG_DATA)")
        return missing

    @property
    def has_models(self) -> bool:
        """Whether what the figure reads at least is given."""
        if self.which in OVER_TRAINING and self.snapshots:
            return True
        return bool(self.model) or self.which in (*ALONE, ALL)
