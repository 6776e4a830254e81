"""Options of object discovery."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator
from vitreg_core.config import override
from vitreg_core.errors import InputError

from vitreg_eval.config.base import AUTO, TaskOptions

Facet = Literal["keys", "queries", "values"]

ORIGINAL: dict[str, Any] = {"method": "lost", "k_patches": 100}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**ORIGINAL, "layer": -1, "center": False, "normalize": False, "sweep": True, "layers": (-1,)},
    "study": {**ORIGINAL, "layer": -1, "center": True, "normalize": True, "bias": 0.05, "sweep": False},
    "test-time-registers": {
        **ORIGINAL,
        "center": False,
        "normalize": True,
        "sweep": True,
        "layers": (-1, -2, -3, -4),
        "biases": tuple(step / 20 for step in range(-20, 1)),
    },
}
"""The settings in print. All take keys for DINOv2 and values for DeiT-III and OpenCLIP, which --features says. `paper`
is raw LOST with a bias set by hand on unstated data, hence a sweep; `study` is one fixed setting; the authors of
test-time registers swept the last four blocks and biases from -1 to 0 on features of length 1."""


SETTINGS = {
    "lost": ("k_patches", "center", "normalize", "bias", "relative_bias"),
    "tokencut": ("tau",),
    "dino-seg": ("head", "mass"),
}
"""Options that one method alone reads."""


class LostOptions(TaskOptions):
    """LOST object discovery: one box per image from features alone; CorLoc where there are true boxes."""

    dataset: Literal["scenes", "voc07", "voc12", "coco20k", "coco"] = "scenes"
    """Images with true boxes; coco20k is the published list of COCO train2014, coco any list or split of COCO."""
    data: Path | None = None
    """Folder that holds VOCdevkit, or images and annotations of COCO; $VITREG_DATA if not given."""
    images: Path | None = None
    """Folder of photos without boxes, in place of a data set; gives boxes and no CorLoc."""
    split: str | None = None
    """Split of VOC or COCO; trainval, or train2014, if not given."""
    coco_list: Path | None = None
    """Image list of coco20k (coco_20k_filenames.txt of LOST, looked for in the data folder if not given) or coco."""
    no_hard: bool = False
    """Leave out true boxes marked difficult or truncated (VOC), and images without any other."""
    test_images: PositiveInt = 1000
    """Scenes to measure on."""
    method: Literal["lost", "tokencut", "dino-seg", "pca", "full", "center", "random"] = "lost"
    """How to find the object; the last four are ours, to compare with."""
    preset: Literal["paper", "study", "test-time-registers"] | None = None
    """A setting in print; it fixes layers, centring, normalising and bias, and refuses other values beside it. Give
    --features keys for DINOv2, values for DeiT-III and OpenCLIP."""
    features: Facet = "keys"
    """Which output of the qkv projection (the paper: keys for DINOv2, values for DeiT-III and OpenCLIP)."""
    layer: int = -1
    """Block whose attention is read; blocks count from 0, -1 is the last."""
    k_patches: PositiveInt = 100
    """Patches of lowest degree that may join the seed."""
    center: bool = False
    """Subtract the mean patch of each image first."""
    normalize: bool = False
    """Scale every patch to length 1 first."""
    bias: float = 0.0
    """Added to every similarity."""
    relative_bias: bool = False
    """Count biases in units of the mean squared length of the patches of each image (1 where they are normalised)."""
    outliers: Literal["keep", "smooth"] = "keep"
    """Leave outlier patches as they are, or give them the mean features of their neighbours that are none."""
    sweep: bool = False
    """Measure every setting of --layers, --facets and --biases in one pass; biases count as with --relative_bias."""
    layers: tuple[int, ...] = (-1, -2, -3, -4)
    """Blocks of a sweep."""
    facets: tuple[Facet, ...] = ()
    """Outputs of the qkv projection in a sweep; that of --features if not given."""
    biases: tuple[float, ...] = (-0.8, -0.6, -0.5, -0.4, -0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1)
    """Biases of a sweep."""
    tau: float = Field(default=0.2, ge=-1, le=1)
    """Cosine above which tokencut joins two patches."""
    head: NonNegativeInt | None = 4
    """Attention head that dino-seg reads, from 0; none for the mean over heads."""
    mass: float = Field(default=0.6, gt=0, le=1)
    """Share of the attention that dino-seg keeps."""
    steps: PositiveInt = 4
    """Images whose search is drawn step by step in steps.png."""

    def needs(self) -> list[str]:
        """As for every task."""
        self.check_data()
        if AUTO in self.registers:
            raise InputError(
                "--registers auto: this task looks into single blocks, whose tokens then differ; give numbers"
            )
        chosen = self.resolved()
        if chosen.sweep and chosen.method != "lost":
            raise InputError(f"--sweep with --method {chosen.method}: only lost has a bias; leave out one of them")
        chosen.check_method()
        if chosen.sweep and self.images is not None:
            raise InputError(f"--sweep with --images {self.images}: no true boxes to judge by; give a --dataset")
        needs_data = self.dataset != "scenes" and self.data is None and not os.environ.get("VITREG_DATA")
        holds = "VOCdevkit" if self.dataset.startswith("voc") else "images and annotations of COCO"
        missing = [f"--data DIR, the folder that holds {holds} (or set VITREG_DATA)"] if needs_data else []
        return [*super().needs(), *missing]

    def check_data(self) -> None:
        """Refuse sources of images that do not go together."""
        if self.dataset == "scenes" and self.data is not None:
            raise InputError(
                f"--data {self.data} with --dataset scenes; give --dataset voc07, voc12 or coco20k, or --images DIR"
            )
        if self.images is not None and self.dataset != "scenes":
            raise InputError(f"--images {self.images} with --dataset {self.dataset}; give one of them")
        if self.coco_list is not None and not self.dataset.startswith("coco"):
            raise InputError(f"--coco_list {self.coco_list} with --dataset {self.dataset}; give --dataset coco20k")
        if self.no_hard and not self.dataset.startswith("voc"):
            raise InputError(f"--no_hard with --dataset {self.dataset}; only VOC marks boxes as difficult or truncated")

    def check_method(self) -> None:
        """Refuse settings of another method than the one that is used."""
        for method, names in SETTINGS.items():
            for name in names:
                given = getattr(self, name)
                if method != self.method and given != type(self).model_fields[name].default:
                    raise InputError(
                        f"--{name} {given} with --method {self.method}: only {method} has it; leave it out"
                    )

    def resolved(self) -> "LostOptions":
        """These options with what the preset fixes.

        Raises:
            InputError: a value beside the preset that is neither the default nor the preset's.
        """
        fixed: Mapping[str, Any] = {} if self.preset is None else PRESETS[self.preset]
        for name, value in fixed.items():
            given = getattr(self, name)
            if given not in (value, type(self).model_fields[name].default):
                raise InputError(f"--{name} {given} with --preset {self.preset}, which has {value}; give one of them")
        if fixed.get("sweep") and self.bias:
            raise InputError(f"--bias {self.bias} with --preset {self.preset}, which sweeps it; give one of them")
        return override(self, fixed)

    @field_validator("layers", "facets", "biases", mode="before")
    @classmethod
    def split_lists(cls, given: object) -> tuple[object, ...]:
        """Take several values in one word, between commas."""
        words = given if isinstance(given, Iterable) and not isinstance(given, str) else [given]
        parts = [part for word in words for part in (word.split(",") if isinstance(word, str) else [word])]
        return tuple(part for part in parts if part != "")
