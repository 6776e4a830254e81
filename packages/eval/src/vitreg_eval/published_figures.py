"""Published values of figures, and how ours are made. Nothing here imports torch."""

from dataclasses import dataclass

G = "DINOv2 ViT-g/14"
L = "DINOv2 ViT-L/14"
S = "DeiT-III ViT-S/16"


@dataclass(frozen=True)
class Published:
    """One published number or statement; of other weights and other images than ours, whatever it is."""

    quantity: str
    """What was measured: the name of our metric where we measure the same."""
    of: str
    """Model, and data where they are told."""
    value: float | str


@dataclass(frozen=True)
class PaperFigure:
    """What a reader must know beside a figure of ours."""

    choice: str
    """How ours is made where the papers leave it open, in one sentence."""
    published: tuple[Published, ...] = ()


MAPS = (
    "Last block, mean over heads, row of the class token over the patches (without one: the mean row of the patches), "
    "made to sum to 1; all maps of an image share one colour range, and images are chosen by rule."
)
NORMS = "L2 norms after the last block, before the final norm; outliers by a rule without a hand-set cutoff."
BLOCKS = "L2 norms of patch tokens after every block, before the final norm, of images spread evenly over the set."
NEIGHBOURS = (
    "Every patch with each of its up to four neighbours counts once, under the kind of the patch after the last block; "
    "embeddings before positions are added, and beside them the output."
)
TRAINING = "Every snapshot of the run, the averaged weights where there are some; the same images for all."
GONE = "outliers"

PUBLISHED: dict[str, PaperFigure] = {
    "fig1": PaperFigure(
        f"{MAPS} Images are read at twice the size that the model was trained for, with resized positions; models of "
        "other libraries at their own size.",
        (Published("peakiness", "all families, as drawn", "isolated peaks without registers, none with them"),),
    ),
    "fig2": PaperFigure(
        f"{MAPS} Beside the maps, largest over median and the share of the top 2 % of the patches.",
        (
            Published("peakiness", "DINOv2, DeiT-III, OpenCLIP, as drawn", "isolated peaks"),
            Published("peakiness", "DINO, as drawn", "no isolated peaks"),
        ),
    ),
    "fig3": PaperFigure(
        f"{NORMS} A cutoff of one's own stands beside it.",
        (
            Published("outlier_fraction", f"{G}, norm > 150", 0.0237),
            Published("outlier_ratio", f"{G}, about", 10.0),
        ),
    ),
    "fig4a": PaperFigure(
        f"{BLOCKS} Outliers emerge in the first block with an outlier mode that the next block has too.",
        (
            Published("emergence_block", f"{G}, about, of 40 blocks", 15.0),
            Published("emergence_depth", f"{G}, about", 0.375),
        ),
    ),
    "fig4b": PaperFigure(
        f"{TRAINING} Outliers emerge at the first snapshot with an outlier mode that the next one has too.",
        (Published("emergence_share_of_training", f"{G}, about", 0.333),),
    ),
    "fig4c": PaperFigure(
        f"{NORMS} Released small DINOv2 models are distilled from the giant and are not the paper's.",
        (
            Published("outlier_fraction", "DINOv2 L, H and g trained alike, as drawn", "outliers"),
            Published("outlier_fraction", "DINOv2 Ti, S and B trained alike, as drawn", "none"),
        ),
    ),
    "fig5a": PaperFigure(
        NEIGHBOURS, (Published("input_outlier_median", f"{G}, as drawn", "near 1; normal patches broad"),)
    ),
    "fig5b": PaperFigure(
        "Linear models on the tokens after the final norm, fitted on all tokens of 80 % of the images and judged by "
        "the others: a softmax over the positions, and a ridge regression on standardised pixels.",
        (
            Published("position_top1_normal", G, 0.417),
            Published("position_top1_outlier", G, 0.228),
            Published("position_distance_normal", G, 0.79),
            Published("position_distance_outlier", G, 5.09),
            Published("reconstruction_normal", f"{G}, L2 of 588 values, scale not told", 18.38),
            Published("reconstruction_outlier", f"{G}, L2 of 588 values, scale not told", 25.23),
        ),
    ),
    "fig6": PaperFigure("A drawing of where registers join the sequence."),
    "fig7": PaperFigure(
        f"{NORMS} Patches alone in the first picture, every kind of token in the second.",
        (Published("outlier_fraction", "DINOv2, OpenCLIP, DeiT-III with 4 registers, as drawn", "none"),),
    ),
    "fig8": PaperFigure(
        f"{MAPS} Curves come from results of earlier runs; the paper prints numbers for 0 and 4 registers alone.",
        (
            Published("linear top1_val_selected on imagenet-1k, 0 registers", f"{L}", 0.843),
            Published("linear top1_val_selected on imagenet-1k, 4 registers", f"{L}", 0.848),
            Published("segment miou on ade20k, 0 registers", f"{L}", 0.466),
            Published("segment miou on ade20k, 4 registers", f"{L}", 0.479),
            Published("depth rmse on nyu, 0 registers", f"{L}", 0.378),
            Published("depth rmse on nyu, 4 registers", f"{L}", 0.366),
            Published("attention maps", f"{L}, as drawn", "clean from 1 register on"),
        ),
    ),
    "fig9": PaperFigure(
        "Last block, mean over heads; all registers, and their overlap in numbers as figure 11 of the study has it.",
        (Published("register maps", "DINOv2 with more than 12 registers, as drawn", "some natural diversity"),),
    ),
    "fig10": PaperFigure(
        "Share of the images with an outlier at a position; each measure of unevenness stands beside what chance draws "
        "with as many outliers.",
        (Published("largest_position_share", f"{G}, some positions, more than", 0.2),),
    ),
    "fig11": PaperFigure(
        "Gradient of the sum of the resized table with respect to the stored one; 16 x 16 to 7 x 7, and for each model "
        "from its own grid to 7 x 7.",
        (Published("stripes", "16 x 16 to 7 x 7 without antialias, as drawn", "columns of unequal weight"),),
    ),
    "fig12": PaperFigure(
        "FLOPs of one forward pass at the native image size, a multiply-add being 2; the paper's model is taken to be "
        "ViT-L/14 at 224 pixels, whose numbers agree with its curve.",
        (
            Published("flops_growth_reg4", "model not told, less than", 0.02),
            Published("flops_growth_reg16", "model not told, up to", 0.06),
        ),
    ),
    "fig13": PaperFigure(
        "LOST on whole pictures with 100 patches and no bias: score, similarity to the seed, patches that vote, mask, "
        "box.",
        (Published("maps", "DeiT-III and DINOv2 with registers, as drawn", "improved; OpenCLIP robust without"),),
    ),
    "fig14": PaperFigure(MAPS, (Published("peakiness", "with registers, as drawn", "smooth maps"),)),
    "fig15": PaperFigure(
        "Fitted on all patches of the set before the final norm, in robust standard deviations of the normal patches, "
        "in the range -3 to 3 and in the paper's, -30 to 30.",
        (Published("maps", "with registers, as drawn", "smoother"),),
    ),
    "fig16": PaperFigure(
        f"{NORMS} One logarithmic colour scale for all.",
        (Published("peaks", "without registers, as drawn", "where the artifacts are"),),
    ),
    "study_fig1": PaperFigure(
        MAPS,
        (
            Published("peakiness", "DINOv2 ViT-S, as drawn", "clean"),
            Published("peakiness", f"{S}, as drawn", "peaks"),
        ),
    ),
    "study_fig4": PaperFigure(
        f"{NORMS} The study takes norms of DeiT-III after the final norm.",
        (
            Published("outlier_fraction", f"{G}, as drawn", "heavy tail, smaller with registers"),
            Published("outlier_fraction", f"{S}, as drawn", "weaker tail, smaller with registers"),
        ),
    ),
    "study_fig5": PaperFigure(BLOCKS, (Published(GONE, f"{G} with 4 registers", "outliers of deep blocks are gone"),)),
    "study_fig6": PaperFigure(
        f"{NEIGHBOURS} The study takes the top 2 % of the norms as outliers, whether there is a mode or not.",
        (Published("cutoff", f"{S}, 98th percentile after the final norm", 63.85),),
    ),
    "study_fig7": PaperFigure(
        f"{MAPS} Least peaky, median and peakiest image of the first model.",
        (Published("peakiness", f"{S} with 0 to 16 registers, as drawn", "artifacts may go, not always"),),
    ),
    "study_fig8": PaperFigure(
        f"{BLOCKS} {TRAINING}",
        (
            Published(GONE, f"{S} with 4 registers", "fewer and weaker"),
            Published(GONE, f"{S}, 800 epochs", "more compact in the last quarter"),
        ),
    ),
    "study_fig9": PaperFigure(
        f"{TRAINING} The two images are those whose peaks fell most and least from the first snapshot to the last.",
        (Published("maps", f"{S} + 4 registers, every 80 epochs", "change between clean and peaky"),),
    ),
    "study_fig10": PaperFigure(
        "Last block, mean over heads; every image's map is made to sum to 1 before the mean over images.",
        (Published("maps", f"{S} + 4 registers, as drawn", "class token central, registers broad"),),
    ),
    "study_fig11": PaperFigure(
        f"{TRAINING} Cosine of maps that are positive everywhere is high by construction, so correlation is drawn.",
        (
            Published("first_cosine", f"{S} + 4 registers, Imagenette", 0.995),
            Published("last_cosine", f"{S} + 4 registers, Imagenette", 0.929),
        ),
    ),
    "study_reconstruction": PaperFigure(
        "An MLP with four times the width trained for five epochs on true patches and tokens after the final norm, "
        "judged by other images; the study adds errors up over batches of patches that are none, so its values are no "
        "target.",
        (
            Published("error_ratio", f"{S}, 176.54 / 120.02 (printed as 147.1 % increase)", 1.471),
            Published("mse_normal", f"{S}, sum over about 61 batches", 120.02),
            Published("mse_outlier", f"{S}, sum over about 61 batches", 176.54),
        ),
    ),
    "study_carbon": PaperFigure(
        "kg = GPUs x hours x kW x PUE x intensity, all five recorded; the study's intensity is that behind its kg at "
        "its kWh.",
        (
            Published("kwh", "five trainings of DeiT-III S/16, as printed", 580.0),
            Published("kg", "five trainings of DeiT-III S/16, as printed", 256.4),
        ),
    ),
}
