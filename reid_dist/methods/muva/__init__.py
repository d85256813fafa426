"""MUVA: multi-grained vision-language alignment for domain-generalised person re-identification (see README.md)."""

from reid_dist.methods.muva.method import METHOD

__all__ = ["METHOD"]
