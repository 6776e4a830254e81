"""Published values that stand beside ours, always with where they come from."""

PAPER = "Darcet et al. 2024, tables 2a and 3: DeiT-III ViT-B/16 on ImageNet-22k"

WITHOUT_AND_WITH = {  # metric of ours: what the paper measured, without and with 4 registers
    "linear top1": ("ImageNet-1k linear, top-1", "0.847", "0.847"),
    "segment miou": ("ADE20k linear, mIoU", "0.389", "0.391"),
    "depth rmse": ("NYUd linear, RMSE in m", "0.511", "0.512"),
    "lost corloc": ("VOC 2007 LOST, CorLoc", "0.117", "0.271"),
    "doctor outlier_fraction": ("DINOv2 ViT-g/14, norm > 150 (section 2.1)", "0.0237", "not given"),
}
"""Other models on other data: the direction can be compared, the values cannot."""
