"""How a loss over the global batch is cut into the ranks' shares.

A global loss is a mean over B rows. Rank r computes the terms of its own rows (against all gathered columns) and
returns W / B * sum of them; the mean over the W ranks is then the global loss, and averaged gradients are its
gradient, for any contiguous slices, uneven and empty ones included. With all rows and W = 1 a share is the loss
itself.
"""

from __future__ import annotations

from torch import Tensor


def share(per_row: Tensor, total: int | Tensor, world_size: int = 1) -> Tensor:
    """Terms [n] of our rows -> scalar whose mean over ranks is (sum over all rows) / total."""
    return per_row.sum() * world_size / total


def own(total: int, rows: slice | None) -> slice:
    """Our rows of a gathered batch; None: all of them."""
    return slice(0, total) if rows is None else rows
