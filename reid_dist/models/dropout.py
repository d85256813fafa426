"""Dropout whose mask depends on the row, not on where or in which batch the row is computed.

torch's dropout draws from the process's generator, so another number of workers, micro-batches or a recomputation in
the backward pass would draw differently. Here the decision for element j of a row is a hash of (row seed, module
salt, j), in plain integer tensor operations: the same on every device, layout and pass. Row seeds:
data/draws.row_seeds, in batch["row_seed"], handed down as an explicit argument.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_GOLDEN = -1640531527  # 0x9E3779B1 as int32
_MIX1 = -2048144789  # 0x85EBCA6B, murmur3's finaliser
_MIX2 = -1028477387  # 0xC2B2AE35


def _finalise(h: Tensor) -> Tensor:
    """murmur3's finaliser on int32, in place (multiplication wraps; shifts are made logical by masks)."""
    h ^= (h >> 16) & 0xFFFF
    h *= _MIX1
    h ^= (h >> 13) & 0x7FFFF
    h *= _MIX2
    h ^= (h >> 16) & 0xFFFF
    return h


def row_keys(seeds: Tensor, salt: int) -> Tensor:
    """int64 [n] seeds -> int32 [n] keys, other ones for another salt."""
    low = (seeds & 0xFFFFFFFF).to(torch.int32)
    high = ((seeds >> 32) & 0xFFFFFFFF).to(torch.int32)
    salted = _finalise(torch.full_like(low, (salt * 0x9E3779B1 + 0x7F4A7C15) & 0x7FFFFFFF))
    return _finalise(_finalise(low ^ salted) + high)


def keep_mask(seeds: Tensor, salt: int, row_shape: tuple[int, ...], p: float) -> Tensor:
    """bool [n, *row_shape], True with probability 1 - p. `seeds` int64 [n]."""
    size = int(torch.Size(row_shape).numel())
    counter = torch.arange(size, dtype=torch.int32, device=seeds.device) * _GOLDEN
    h = _finalise(row_keys(seeds, salt)[:, None] ^ counter)
    return ((h & 0x7FFFFFFF) >= int(p * 2**31)).view(len(seeds), *row_shape)


class RowDropout(nn.Module):
    """Inverted dropout keyed by row. `salt` tells modules apart: give every one in a model another."""

    def __init__(self, p: float, salt: int) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout probability {p}: expected 0 <= p < 1")
        self.p, self.salt = p, salt

    @property
    def active(self) -> bool:
        """Whether a forward pass now would drop anything."""
        return self.training and self.p > 0.0

    def forward(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        """x [n, ...] -> same shape; seeds int64 [n]. Identity in evaluation. Raises ValueError without seeds."""
        if not self.active:
            return x
        if seeds is None:
            raise ValueError("RowDropout in training needs the rows' seeds (batch['row_seed'])")
        return x * keep_mask(seeds, self.salt, tuple(x.shape[1:]), self.p) * (1.0 / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}, salt={self.salt}"
