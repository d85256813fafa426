"""CoMoE: collaboration mixture-of-experts for text-based person retrieval (see README.md)."""

from reid_dist.methods.comoe.method import METHOD

__all__ = ["METHOD"]
