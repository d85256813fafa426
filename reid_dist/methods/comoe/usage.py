"""How evenly experts are used: counts of routed (token, slot) pairs, their shares and entropy.

Source: methods/comoe.md section 6. The original's counters are never reset and its all-reduce doubles them in place;
here a meter counts one modality of one evaluation, and `reduced` returns a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class ExpertUsageMeter:
    """Counts per expert over any number of calls."""

    def __init__(self, experts: int) -> None:
        self.count = torch.zeros(experts, dtype=torch.int64)

    def update(self, selected: Tensor) -> None:
        """Add chosen experts, int64 of any shape (Routing.selected)."""
        self.add(torch.bincount(selected.flatten().cpu(), minlength=len(self.count)))

    def add(self, counts: Tensor) -> None:
        """Add counts [E] (whole numbers of any type)."""
        self.count += counts.round().to(torch.int64).cpu()

    @property
    def routes(self) -> int:
        """Routed (token, slot) pairs so far."""
        return int(self.count.sum())

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> ExpertUsageMeter:
        """A new meter with the counts of all ranks; this one stays as it is. `reduce` sums a tensor over ranks."""
        total = ExpertUsageMeter(len(self.count))
        total.count = reduce(self.count.clone())
        return total

    def fraction(self) -> Tensor:
        """float64 [E], sums to 1. Raises ValueError before the first update."""
        if self.routes == 0:
            raise ValueError("no token was routed yet")
        return self.count.double() / self.routes

    def entropy(self, epsilon: float = 1e-9) -> float:
        """-sum f log(f + epsilon), natural logarithm; `max_entropy` when all experts share alike."""
        share = self.fraction()
        return float(-(share * (share + epsilon).log()).sum())

    @property
    def max_entropy(self) -> float:
        """log E."""
        return math.log(len(self.count))
