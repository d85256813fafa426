"""MUVA: multi-grained vision-language alignment for domain-generalised person re-identification (see README.md)."""

from dataclasses import replace

from reid_dist.methods.muva.figures import mask_quality, part_masks
from reid_dist.methods.muva.method import METHOD as _METHOD

METHOD = replace(_METHOD, figures=(part_masks, mask_quality))

__all__ = ["METHOD"]
