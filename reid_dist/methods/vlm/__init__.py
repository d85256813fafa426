"""Tuning of the multimodal language model that confirms candidates (see README.md)."""

from reid_dist.methods.vlm.method import METHOD

__all__ = ["METHOD"]
