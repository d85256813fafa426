"""Selective state-space building blocks (methods/climb.md section 3)."""

from reid_dist.models.mamba.conv import causal_conv1d
from reid_dist.models.mamba.mixer import BidirectionalMambaMixer, MambaMixer, ScanPath
from reid_dist.models.mamba.scan import selective_scan

__all__ = ["BidirectionalMambaMixer", "MambaMixer", "ScanPath", "causal_conv1d", "selective_scan"]
