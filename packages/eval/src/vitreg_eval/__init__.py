"""Frozen-feature evaluation, object discovery and artifact diagnosis of vision transformers."""
