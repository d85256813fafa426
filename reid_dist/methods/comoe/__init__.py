"""CoMoE: collaboration mixture-of-experts for text-based person retrieval (see README.md)."""

from dataclasses import replace

from reid_dist.methods.comoe.figures import expert_usage
from reid_dist.methods.comoe.method import METHOD as _METHOD

METHOD = replace(_METHOD, figures=(expert_usage,))

__all__ = ["METHOD"]
