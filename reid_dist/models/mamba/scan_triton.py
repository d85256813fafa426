"""Selective scan as a Triton kernel with its backward, for GPUs on which mamba-ssm does not install.

Same contract and same derivation as scan_cpu.SelectiveScan. One program walks the whole length for one row and BLOCK_D
channels with all states in registers. The forward pass stores the state at every CHUNK-th step; the backward pass walks
the chunks right to left, computes each one's states again into a scratch of one chunk (small enough for the GPU's
cache) and then runs the adjoint over it. Gradients that sum over channels (B, C) or rows (A) leave as one part per
program and are added afterwards, so the result does not depend on scheduling.

TRITON_INTERPRET=1 runs the kernels on a CPU; the tests pin them that way against the torch engine.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32
BLOCK_D = 32


@triton.jit
def _row_of(matrix, at, n, in_n, like):  # type: ignore[no-untyped-def]
    """One row [N] of B or C, repeated for every channel of a block."""
    return tl.load(matrix + at + n, mask=in_n, other=0.0)[None, :] + tl.zeros_like(like)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, s, A, B, C, y, last, kept, length, channels, chunks,
    states: tl.constexpr, N: tl.constexpr, D: tl.constexpr, CHUNK_: tl.constexpr,
    CONST_B: tl.constexpr, CONST_C: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * D + tl.arange(0, D)
    n = tl.arange(0, N)
    in_d, in_n = d < channels, n < states
    tile = in_d[:, None] & in_n[None, :]
    place = n[None, :] * channels + d[:, None]
    rate = tl.load(A + place, mask=tile, other=0.0)
    zero = tl.zeros([D, N], dtype=rate.dtype)
    b = tl.load(B + place, mask=tile, other=0.0) if CONST_B else zero
    c = tl.load(C + place, mask=tile, other=0.0) if CONST_C else zero
    h = zero
    for t in range(length):
        if KEEP and t % CHUNK_ == 0:
            tl.store(kept + (row * chunks + t // CHUNK_) * states * channels + place, h, mask=tile)
        at = (row * length + t) * channels + d
        xt = tl.load(x + at, mask=in_d, other=0.0)
        st = tl.load(s + at, mask=in_d, other=0.0)
        if not CONST_B:
            b = _row_of(B, (row * length + t) * states, n, in_n, h)
        if not CONST_C:
            c = _row_of(C, (row * length + t) * states, n, in_n, h)
        h = tl.exp(st[:, None] * rate) * h + xt[:, None] * b
        tl.store(y + at, tl.sum(h * c, axis=1), mask=in_d)
    tl.store(last + row * states * channels + place, h, mask=tile)


@triton.jit
def _collect(total, value, place, in_n, CONST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradient of a constant matrix: added up; of one row: this block's part of it is stored."""
    if CONST:
        total += value
    else:
        tl.store(place, tl.sum(value, axis=0), mask=in_n)
    return total


@triton.jit
def _replay(  # type: ignore[no-untyped-def]
    x, s, B, b, h, rate, own, start, count, channels, d, in_d, n, in_n,
    states: tl.constexpr, N: tl.constexpr, D: tl.constexpr, CONST_B: tl.constexpr,
):  # fmt: skip
    """Store into `own` the state before each of `count` steps of a chunk; it starts at `start` with the state `h`."""
    for j in range(count):
        tl.store(own + j * D * N, h)
        at = (start + j) * channels + d
        xt = tl.load(x + at, mask=in_d, other=0.0)
        st = tl.load(s + at, mask=in_d, other=0.0)
        if not CONST_B:
            b = _row_of(B, (start + j) * states, n, in_n, h)
        h = tl.exp(st[:, None] * rate) * h + xt[:, None] * b


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x, s, A, B, C, g, kept, scratch, dx, ds, dA, dB, dC, length, channels, chunks, blocks,
    states: tl.constexpr, N: tl.constexpr, D: tl.constexpr, CHUNK_: tl.constexpr,
    CONST_B: tl.constexpr, CONST_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    d = part * D + tl.arange(0, D)
    n = tl.arange(0, N)
    in_d, in_n = d < channels, n < states
    tile = in_d[:, None] & in_n[None, :]
    place = n[None, :] * channels + d[:, None]
    rate = tl.load(A + place, mask=tile, other=0.0)
    zero = tl.zeros([D, N], dtype=rate.dtype)
    b = tl.load(B + place, mask=tile, other=0.0) if CONST_B else zero
    c = tl.load(C + place, mask=tile, other=0.0) if CONST_C else zero
    own = scratch + (row * blocks + part) * CHUNK_ * D * N + tl.arange(0, D)[:, None] * N + n[None, :]
    mine = part.to(tl.int64) * tl.num_programs(0) * length * states  # this program's part of dB and dC
    sent = zero  # exp(s_{t+1} A) lam_{t+1}
    sum_a, sum_b, sum_c = zero, zero, zero
    for back in range(chunks):
        chunk = chunks - 1 - back
        first = chunk * CHUNK_
        count = tl.minimum(CHUNK_, length - first)
        h = tl.load(kept + (row * chunks + chunk) * states * channels + place, mask=tile, other=0.0)
        _replay(
            x, s, B, b, h, rate, own, row * length + first, count, channels, d, in_d, n, in_n, states, N, D, CONST_B
        )
        tl.debug_barrier()
        for i in range(count):
            j = count - 1 - i
            at = (row * length + first + j) * channels + d
            by_state = (row * length + first + j) * states + n
            xt = tl.load(x + at, mask=in_d, other=0.0)
            st = tl.load(s + at, mask=in_d, other=0.0)
            gt = tl.load(g + at, mask=in_d, other=0.0)
            before = tl.load(own + j * D * N)
            if not CONST_B:
                b = _row_of(B, (row * length + first + j) * states, n, in_n, zero)
            if not CONST_C:
                c = _row_of(C, (row * length + first + j) * states, n, in_n, zero)
            decay = tl.exp(st[:, None] * rate)
            lam = gt[:, None] * c + sent
            now = decay * before + xt[:, None] * b
            sum_c = _collect(sum_c, gt[:, None] * now, dC + mine + by_state, in_n, CONST_C)
            sum_b = _collect(sum_b, lam * xt[:, None], dB + mine + by_state, in_n, CONST_B)
            tl.store(dx + at, tl.sum(lam * b, axis=1), mask=in_d)
            sent = decay * lam
            w = sent * before
            tl.store(ds + at, tl.sum(w * rate, axis=1), mask=in_d)
            sum_a += w * st[:, None]
        tl.debug_barrier()
    whole = row * states * channels + place
    tl.store(dA + whole, sum_a, mask=tile)
    if CONST_B:
        tl.store(dB + whole, sum_b, mask=tile)
    if CONST_C:
        tl.store(dC + whole, sum_c, mask=tile)


class SelectiveScan(torch.autograd.Function):
    """As scan_cpu.SelectiveScan."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        x, s, A, B, C = (m.contiguous() for m in (x, s, A, B, C))
        batch, length, channels = x.shape
        states, chunks, keep = A.shape[0], triton.cdiv(length, CHUNK), any(ctx.needs_input_grad)
        y = torch.empty_like(x)
        last = x.new_empty(batch, states, channels)
        kept = x.new_empty(batch if keep else 0, chunks, states, channels)
        _forward[(batch, triton.cdiv(channels, BLOCK_D))](
            x, s, A, B, C, y, last, kept, length, channels, chunks,
            states=states, N=triton.next_power_of_2(states), D=BLOCK_D, CHUNK_=CHUNK,
            CONST_B=B.dim() == 2, CONST_C=C.dim() == 2, KEEP=keep,
        )  # fmt: skip
        ctx.save_for_backward(x, s, A, B, C, kept)
        ctx.mark_non_differentiable(last)
        return y, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, s, A, B, C, kept = ctx.saved_tensors
        batch, length, channels = x.shape
        states, chunks, blocks = A.shape[0], kept.shape[1], triton.cdiv(channels, BLOCK_D)
        wide = triton.next_power_of_2(states)
        dx, ds = torch.empty_like(x), torch.empty_like(s)
        dA = x.new_empty(batch, states, channels)
        # Parts to be added: per row where the matrix is constant, per block of channels where it is not.
        dB, dC = (x.new_empty(batch if m.dim() == 2 else blocks, *m.shape) for m in (B, C))
        scratch = x.new_empty(batch * blocks * CHUNK * BLOCK_D * wide)
        _backward[(batch, blocks)](
            x, s, A, B, C, grads[0].contiguous(), kept, scratch, dx, ds, dA, dB, dC, length, channels, chunks, blocks,
            states=states, N=wide, D=BLOCK_D, CHUNK_=CHUNK, CONST_B=B.dim() == 2, CONST_C=C.dim() == 2,
        )  # fmt: skip
        return dx, ds, dA.sum(0), dB.sum(0), dC.sum(0)


def scan(x: Tensor, s: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Typed entry to `SelectiveScan`."""
    y, last = SelectiveScan.apply(x, s, A, B, C)
    return y, last
