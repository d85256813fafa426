"""What ranks tell each other in a step, differentiable where losses need it.

Slices of the global batch are contiguous and may be uneven or empty; every rank knows all counts from the plan, so gathers
pad to the largest slice and cut again. The backward of a gather sums the gradients of all ranks and returns the own slice:
together with gradient *averaging* this gives the single-process gradient when the loss terms' mean over ranks is the global
term (measured: 7.5e-8 relative). Without a process group every function is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """[n, ...] of each rank -> [sum(counts), ...] in rank order; no gradient. n must equal counts[rank]."""
    rank, size = world()
    if rows.shape[0] != counts[rank]:
        raise ValueError(f"rank {rank} gathers {rows.shape[0]} rows, the step's slice has {counts[rank]}")
    if size == 1:
        return rows
    widest = max(counts)
    if rows.dtype == torch.bool:
        return all_gather_rows(rows.to(torch.uint8), counts).to(torch.bool)
    padded = rows.new_zeros((widest, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.counts = counts
        return all_gather_rows(rows, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rank, _ = world()
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start = sum(ctx.counts[:rank])
        return total[start : start + ctx.counts[rank]], None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Differentiable `all_gather_rows`."""
    if world()[1] == 1 or not rows.requires_grad:
        return all_gather_rows(rows, counts)
    return _GatherRows.apply(rows, tuple(counts))


def reduce_sum(value: Tensor) -> Tensor:
    """Differentiable sum over ranks (backward: sum of the ranks' gradients)."""
    if world()[1] == 1:
        return value
    if not value.requires_grad:
        total = value.clone()
        dist.all_reduce(total)
        return total
    return _Reduce.apply(value)


def broadcast_object(value: Any) -> Any:
    """Rank 0's picklable value on every rank."""
    if world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
