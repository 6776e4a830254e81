"""Published values that stand beside ours, always with where they come from. This module imports no torch."""

from dataclasses import dataclass, field
from typing import Any

PAPER = "Darcet et al. 2024, tables 2a and 3: DeiT-III ViT-B/16 on ImageNet-22k"

WITHOUT_AND_WITH = {  # metric of ours: what the paper measured, without and with 4 registers
    "linear top1": ("ImageNet-1k linear, top-1", "0.847", "0.847"),
    "segment miou": ("ADE20k linear, mIoU", "0.389", "0.391"),
    "depth rmse": ("NYUd linear, RMSE in m", "0.511", "0.512"),
    "lost corloc": ("VOC 2007 LOST, CorLoc", "0.117", "0.271"),
    "doctor outlier_fraction": ("DINOv2 ViT-g/14, norm > 150 (section 2.1)", "0.0237", "not given"),
}
"""Other models on other data: the direction can be compared, the values cannot."""


@dataclass(frozen=True)
class Column:
    """One data set of a table, and the task that measures it."""

    title: str
    """Data set and measure, as readers know them."""
    task: str
    """Our task."""
    dataset: str
    """The data set's name on our command line."""
    metric: str
    """What of the task's metrics stands in the table, after the kind of row where there is one."""
    images: int | None
    """Images that the published value was measured on; none where the paper does not say which."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the task."""
    folder: str = ""
    """Where the data set lies below --data, for those that are not found by their layout."""


@dataclass(frozen=True)
class PaperTable:
    """A table of Darcet et al. 2024 (Vision Transformers Need Registers), or of the study of small models."""

    title: str
    columns: tuple[Column, ...]
    rows: dict[str, tuple[float | None, ...]]
    """Published values by model: shares from 0 to 1, and metres; None where none is given."""
    kinds: tuple[str, ...] = ("",)
    """Rows that each of our models has; the names of metrics begin with them."""
    protocol: str = ""
    """What is known of the protocol, for the reader."""
    known: bool = True
    """Whether the paper says enough of its protocol to call another one the same."""
    source: str = "paper"
    """What stands before the names of published rows."""


TOKEN_SETS = (  # the columns of table 1: title, name, images of the evaluation split
    ("ImageNet-1k", "imagenet-1k", 50000),
    ("Places205", "places205", 20500),
    ("Aircraft", "aircraft", 3333),
    ("CIFAR-10", "cifar10", 10000),
    ("CIFAR-100", "cifar100", 10000),
    ("CUB", "cub", 5794),
    ("Caltech101", "caltech101", None),
    ("Cars", "cars", 8041),
    ("DTD", "dtd", 1880),
    ("Flowers", "flowers102", 6149),
    ("Food", "food101", 25250),
    ("Pets", "pets", 3669),
    ("SUN397", "sun397", 19850),
    ("VOC 2007", "voc2007", 4952),
)
SEVERAL = "voc2007"
"""Its images show several classes each, so that its measure is mean average precision."""
CLS = (86.0, 66.4, 87.3, 99.4, 94.5, 91.3, 96.9, 91.5, 85.2, 99.7, 94.7, 96.9, 78.6, 89.1)
NORMAL = (65.8, 53.1, 17.1, 97.1, 81.3, 18.6, 73.2, 10.8, 63.1, 59.5, 74.2, 47.8, 37.7, 70.8)
OUTLIER = (69.0, 55.1, 79.1, 99.3, 93.7, 84.9, 97.6, 85.2, 84.9, 99.6, 93.5, 94.1, 78.5, 89.7)


def shares(percent: tuple[float, ...]) -> tuple[float, ...]:
    """Percentages as shares of 1."""
    return tuple(round(value / 100, 4) for value in percent)


COCO_MASKS = {"ignore_zero": True, "crop": 224}
"""Pixels without a class are 0 in these masks."""

STUDY_SETS = (("Caltech101", "caltech101"), ("CIFAR-10", "cifar10"), ("Imagenette", "imagenette"))
STUDY_TOKENS: dict[str, tuple[float | None, ...]] = {  # Caltech101, CIFAR-10, Imagenette, Flowers
    "DeiT-III S/16, class token": (0.9988, 0.9251, 1.0, 1.0),
    "DeiT-III S/16, low norm": (0.7161, 0.7534, 0.9462, 0.1966),
    "DeiT-III S/16, high norm": (0.8540, 0.7853, 0.9568, 0.5608),
    "DeiT-III S/16 + 4 registers, class token": (0.9990, 0.9285, 1.0, 1.0),
    "DeiT-III S/16 + 4 registers, low norm": (0.7941, 0.7727, 0.9781, 0.3180),
    "DeiT-III S/16 + 4 registers, high norm": (0.8153, 0.7841, 0.9759, 0.2427),
    "DINOv2 S/14, class token": (0.9994, None, 1.0, None),
    "DINOv2 S/14, low norm": (0.9123, 0.9222, 0.9632, 0.7255),
    "DINOv2 S/14, high norm": (0.9439, 0.9399, 0.9724, 0.9000),
    "DINOv2 S/14 + 4 registers, class token": (0.9992, None, 1.0, None),
    "DINOv2 S/14 + 4 registers, low norm": (0.9442, 0.9434, 0.9757, 0.8720),
    "DINOv2 S/14 + 4 registers, high norm": (0.9602, 0.9485, 0.9859, 0.9468),
}

PAPER_TABLES = {
    "table1": PaperTable(
        "Table 1: classification from one token",
        tuple(
            Column(title, "tokens", name, "map" if name == SEVERAL else "top1", images)
            for title, name, images in TOKEN_SETS
        ),
        {
            "DINOv2 ViT-g/14, class token": shares(CLS),
            "DINOv2 ViT-g/14, normal token": shares(NORMAL),
            "DINOv2 ViT-g/14, outlier token": shares(OUTLIER),
        },
        kinds=("cls", "normal", "outlier"),
        protocol=(
            "Logistic regression on one token per image, drawn at random among its normal or its outlier patches. The "
            "paper's outliers have norms above 150; what it does with images without outliers is not said."
        ),
    ),
    "table2a": PaperTable(
        "Table 2a: frozen features",
        (
            Column("ImageNet-1k linear, top-1", "linear", "imagenet-1k", "top1_val_selected", 50000),
            Column("ADE20k linear, mIoU", "segment", "ade20k", "miou", 2000),
            Column("NYUd linear, RMSE in m", "depth", "nyu", "rmse", 654),
        ),
        {
            "DeiT-III ViT-B/16": (0.847, 0.389, 0.511),
            "DeiT-III ViT-B/16 + 4 registers": (0.847, 0.391, 0.512),
            "OpenCLIP ViT-B/16": (0.782, 0.266, 0.702),
            "OpenCLIP ViT-B/16 + 4 registers": (0.781, 0.267, 0.661),
            "DINOv2 ViT-L/14": (0.843, 0.466, 0.378),
            "DINOv2 ViT-L/14 + 4 registers": (0.848, 0.479, 0.366),
        },
        protocol=(
            "Linear heads on frozen features by the protocols of DINOv2, augmented at every step. The linear one is "
            "the best on the images that it is reported on; result.json also holds one chosen on others."
        ),
    ),
    "table2b": PaperTable(
        "Table 2b: zero-shot classification",
        (Column("ImageNet-1k zero-shot, top-1", "zeroshot", "imagenet-1k", "top1", 50000),),
        {"OpenCLIP ViT-B/16": (0.599,), "OpenCLIP ViT-B/16 + 4 registers": (0.601,)},
        protocol="Class names in prompts, read by the text tower.",
    ),
    "table3": PaperTable(
        "Table 3: object discovery with LOST, CorLoc",
        (
            Column("VOC 2007", "lost", "voc07", "corloc", 5011),
            Column("VOC 2012", "lost", "voc12", "corloc", 11540),
            Column("COCO 20k", "lost", "coco20k", "corloc", 19817),
        ),
        {
            "DeiT-III ViT-B/16": (0.117, 0.131, 0.107),
            "DeiT-III ViT-B/16 + 4 registers": (0.271, 0.327, 0.251),
            "OpenCLIP ViT-B/16": (0.388, 0.443, 0.310),
            "OpenCLIP ViT-B/16 + 4 registers": (0.371, 0.420, 0.279),
            "DINOv2 ViT-L/14": (0.353, 0.402, 0.269),
            "DINOv2 ViT-L/14 + 4 registers": (0.554, 0.600, 0.420),
        },
        protocol=(
            "Values of DeiT-III and OpenCLIP, keys of DINOv2, and a bias added to the similarities by hand, which the "
            "paper does not give."
        ),
        known=False,
    ),
    "study_table1": PaperTable(
        "Study, table 1: object discovery with LOST, CorLoc",
        (Column("VOC 2007", "lost", "voc07", "corloc", 5011, {"preset": "study"}),),
        {
            "DINOv2 L/14": (0.3377,),
            "DINOv2 L/14 + 4 registers": (0.3524,),
            "DINOv2 S/14": (0.3748,),
            "DINOv2 S/14 + 4 registers": (0.3293,),
            "DINO": (0.6148,),
            "DeiT-III S/16": (0.1513,),
            "DeiT-III S/16 + 2 registers": (0.1549,),
            "DeiT-III S/16 + 4 registers": (0.1792,),
            "DeiT-III S/16 + 8 registers": (0.1803,),
            "DeiT-III S/16 + 16 registers": (0.1901,),
        },
        protocol=(
            "Centred features of length 1 and a bias of 0.05: keys of DINOv2, values of DeiT-III. Ours searches every "
            "image whole; the study's code clips boxes of DeiT-III, found in crops, to the size of the whole image, "
            "and scores 3,550 of the 5,011 images."
        ),
        known=False,
        source="study",
    ),
    "study_table2": PaperTable(
        "Study, tables 2, 4 and 5: classification from one token",
        (
            *(Column(title, "tokens", name, "top1", None) for title, name in STUDY_SETS),
            Column("Flowers", "tokens", "flowers102", "top1", None),
        ),
        STUDY_TOKENS,
        kinds=("cls", "normal", "outlier"),
        protocol=(
            "Logistic regression on one token per image. Ours counts what is above one cutoff for all images as "
            "outliers and judges by images that were not trained on; the study takes the top 2 % of the norms of each "
            "batch, and its class tokens are right on all images of two sets, as on images that were trained on."
        ),
        known=False,
        source="study",
    ),
    "samples": PaperTable(
        "Frozen evaluation on the sample data",
        (
            Column("Imagenette k-NN, top-1", "knn", "imagenette", "top1", 400, {"dataset": None}, "imagenette-224"),
            Column(
                "Imagenette linear, top-1", "linear", "imagenette", "top1", 400, {"dataset": None}, "imagenette-224"
            ),
            Column(
                "Imagenette logistic, top-1", "logreg", "imagenette", "top1", 400, {"dataset": None}, "imagenette-224"
            ),
            Column("ImageNet sample, own head, top-1", "classify", "imagenet", "top1", 1000, {}, "imagenet-sample/val"),
            Column("COCO masks, mIoU", "segment", "masks", "miou", 100, COCO_MASKS, "coco-semseg"),
            Column("ADE20k, mIoU", "segment", "ade20k", "miou", 9, {"crop": 224}),
            Column("7-Scenes, RMSE in m", "depth", "rgbd", "rmse", 25, {}, "seven-scenes"),
            Column("VOC 2012, CorLoc", "lost", "voc12", "corloc", 205),
        ),
        {},
        protocol="Small parts of public data sets: numbers to compare with one another, not with published ones.",
        known=False,
    ),
}
"""Trained by the paper's authors on ImageNet-22k or image-text pairs, and not released."""
