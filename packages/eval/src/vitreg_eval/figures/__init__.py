"""The figures of the paper and of the study, from models, images, snapshots and earlier results."""
