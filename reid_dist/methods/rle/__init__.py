"""RLE: random linear enhancement for visible-infrared person re-identification (see README.md)."""

from dataclasses import replace

from reid_dist.methods.rle.figures import augmentation
from reid_dist.methods.rle.method import METHOD as _METHOD

METHOD = replace(_METHOD, figures=(augmentation,))

__all__ = ["METHOD"]
