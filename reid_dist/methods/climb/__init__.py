"""CLIMB-ReID: prompt-free CLIP with a prototype memory and a Mamba head, for images and video (see README.md)."""

from dataclasses import replace

from reid_dist.methods.climb.figures import token_order
from reid_dist.methods.climb.method import METHOD as _METHOD

METHOD = replace(_METHOD, figures=(token_order,))

__all__ = ["METHOD"]
