"""Contrast of images and texts, as in CLIP: its config, losses and data."""
