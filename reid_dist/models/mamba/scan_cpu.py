"""Selective scan in plain torch, with a hand-written adjoint (methods/climb.md section 3.1; Gu and Dao 2023, eq. 2).

    h_t = exp(s_t A) h_{t-1} + s_t u_t B_t        y_t = C_t . h_t        (elementwise over the n states of a channel)

Differentiating the textbook loop keeps every h_t and takes one Python step per token. Here time is cut into segments of
K chunks of Q tokens. All chunks of a segment advance together, so a segment costs Q + K short steps instead of K * Q:

1. fold    every chunk from state zero, which gives what a chunk adds to the state (one multiply-add per element);
2. carry   h_in[k+1] = added[k] + exp(A * sum of s over chunk k) * h_in[k]     (exact: the decays multiply);
3. seed    every chunk again from its h_in, now keeping h.

The backward pass runs 3 from the stored h_in (1/Q of all states) and 1 to 3 on the adjoint, right to left:

    lam_t = g_t C_t + exp(s_{t+1} A) lam_{t+1};   dC = g h;  dB = lam s u;  d(s u) = B . lam;
    w_t = lam_t exp(s_t A) h_{t-1};   ds = A . w + u (B . lam);   dA = sum_t s_t w_t.

Exponents are never positive, so nothing overflows whatever the step sizes are. Channels are cut into blocks whose
buffers stay in a core's cache; memory beyond inputs and outputs is the h_in plus three such buffers, whatever the
length.

Shapes: b batch, d channels, n states, l length; inside a block (Q, K, n, d): channels last, since torch vectorises
the last axis and step sizes differ by channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOG2_E = 1 / math.log(2)
CHUNK = 8  # Q: tokens that are stepped through
CHUNKS = 4  # K: chunks that advance together
BLOCK_BYTES = 2 * 1024 * 1024  # of one buffer; measured: smaller ones cost more in calls than they gain in cache


@dataclass(frozen=True, slots=True)
class _Cut:
    """How time is cut: S segments of K chunks of Q tokens; and the ranges of channels."""

    chunk: int
    chunks: int
    segments: int
    length: int
    spans: tuple[slice, ...]

    def lay(self, x: Tensor) -> Tensor:
        """[b, l, f] -> [b, S, Q, K, f]; zeros behind the end keep the state and add nothing."""
        missing = self.segments * self.chunks * self.chunk - self.length
        if missing:
            x = torch.cat([x, x.new_zeros(x.shape[0], missing, x.shape[2])], dim=1)
        return x.unflatten(1, (self.segments, self.chunks, self.chunk)).transpose(2, 3).contiguous()

    def pick(self, x: Tensor) -> Tensor:
        """The inverse of `lay`."""
        return x.transpose(2, 3).flatten(1, 3)[:, : self.length]


def _cut(length: int, channels: int, states: int, itemsize: int) -> _Cut:
    chunk = min(CHUNK, length)
    chunks = min(CHUNKS, -(-length // chunk))
    width = max(64, BLOCK_BYTES // (itemsize * chunk * chunks * states) // 64 * 64)
    spans = tuple(slice(c, min(c + width, channels)) for c in range(0, channels, width))
    return _Cut(chunk, chunks, -(-length // (chunk * chunks)), length, spans)


class _Room:
    """Buffers of one block width, used again by every block (fresh ones would cost more in page faults than the
    arithmetic), and the views that the steps need, made once.

    a decays, lam adjoint, spare [Q, K, n, d]; h states [Q + 1, K, n, d], slot 0 what enters; the chunk-to-chunk parts
    [K - 1, n, d]. `first` are views without the last chunk, `rest` without the first.
    """

    def __init__(self, cut: _Cut, states: int, width: int, like: Tensor, backward: bool) -> None:
        shape = (cut.chunks, states, width)
        self.a = like.new_empty(cut.chunk, *shape)
        self.h = like.new_empty(cut.chunk + 1, *shape)
        self.added = like.new_empty(cut.chunks - 1, states, width)
        self.decay = like.new_empty(cut.chunks - 1, states, width)
        self.a_at, self.h_at = self.a.unbind(0), self.h.unbind(0)
        self.a_first, self.h_first = [a[:-1] for a in self.a_at], [h[:-1] for h in self.h_at[1:]]
        self.entering = self.h_at[0].unbind(0)
        self.links = list(zip(self.added.unbind(0), self.decay.unbind(0), strict=True))
        if backward:
            self.lam, self.spare = torch.empty_like(self.a), torch.empty_like(self.a)
            self.lam_at = self.lam.unbind(0)
            self.a_rest, self.lam_rest = [a[1:] for a in self.a_at], [x[1:] for x in self.lam_at]
            self.arriving = like.new_empty(shape)
            self.arriving_at = self.arriving.unbind(0)


@dataclass(frozen=True, slots=True)
class _Block:
    """One segment of one row, one range of channels: s, x = s * u [Q, K, 1, d], A [n, d] times log2(e); B, C
    [Q, K, n, 1], or [n, d] when they do not depend on the input."""

    s: Tensor
    x: Tensor
    A: Tensor
    B: Tensor
    C: Tensor

    def states(self, room: _Room, start: Tensor) -> None:
        """Fill room.a and room.h. `start`: state [n, d] at the segment's start, or all chunks' [K, n, d]."""
        known = start.dim() == 3
        (room.h_at[0] if known else room.entering[0]).copy_(start)  # first: `start` may be a view of room.h
        torch.mul(self.s, self.A, out=room.a).exp2_()  # torch's exp2 is three times as fast as its exp
        torch.mul(self.x, self.B, out=room.h[1:])
        if room.links and not known:
            room.added.copy_(room.h_first[0])
            for adds, decay in zip(room.h_first[1:], room.a_first[1:], strict=True):
                torch.addcmul(adds, decay, room.added, out=room.added)
            torch.mul(self.s.sum(0)[:-1], self.A, out=room.decay).exp2_()
            for k, (added, decay) in enumerate(room.links):
                torch.addcmul(added, decay, room.entering[k], out=room.entering[k + 1])
        for q, decay in enumerate(room.a_at):
            room.h_at[q + 1].addcmul_(decay, room.h_at[q])

    def adjoint(self, room: _Room, g: Tensor, start: Tensor) -> Tensor:
        """Fill room.lam from g [Q, K, 1, d] and `start` [n, d], what the segment after sends back; returns what this
        one sends."""
        torch.mul(g, self.C, out=room.lam)
        room.arriving_at[-1].copy_(start)
        if room.links:
            room.added.copy_(room.lam_rest[-1])
            for q in range(len(room.a_at) - 2, -1, -1):
                torch.addcmul(room.lam_rest[q], room.a_rest[q + 1], room.added, out=room.added)
            room.added.mul_(room.a_rest[0])
            torch.mul(self.s.sum(0)[1:], self.A, out=room.decay).exp2_()
            for k in range(len(room.links) - 1, -1, -1):
                added, decay = room.links[k]
                torch.addcmul(added, decay, room.arriving_at[k + 1], out=room.arriving_at[k])
        room.lam_at[-1].add_(room.arriving)
        for q in range(len(room.a_at) - 2, -1, -1):
            room.lam_at[q].addcmul_(room.a_at[q + 1], room.lam_at[q + 1])
        return room.a_at[0][0] * room.lam_at[0][0]


def _over_states(weights: Tensor, x: Tensor) -> Tensor:
    """sum_n weights x: weights [Q, K, n, 1] or [n, d], x [Q, K, n, d] -> [Q, K, 1, d]."""
    if weights.dim() == 2:
        return (weights * x).sum(-2, keepdim=True)
    return weights.transpose(-1, -2) @ x


def _over_channels(x: Tensor, g: Tensor, like: Tensor, spare: Tensor) -> Tensor:
    """Gradient of B or C in its form: x [Q, K, n, d], g [Q, K, 1, d] -> [Q, K, n, 1] or [n, d]."""
    product = torch.mul(x, g, out=spare)
    return product.sum((0, 1)) if like.dim() == 2 else product.sum(-1, keepdim=True)


class _Laid:
    """The inputs in block order; `block(row, segment, span)` is free of copies."""

    def __init__(self, cut: _Cut, x: Tensor, s: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
        self.x, self.s = cut.lay(x)[..., None, :], cut.lay(s)[..., None, :]
        self.rates = A * LOG2_E
        self.B, self.C = (m if m.dim() == 2 else cut.lay(m)[..., None] for m in (B, C))

    def block(self, row: int, segment: int, span: slice) -> _Block:
        B, C = (m[:, span] if m.dim() == 2 else m[row, segment] for m in (self.B, self.C))
        return _Block(self.s[row, segment, ..., span], self.x[row, segment, ..., span], self.rates[:, span], B, C)


class SelectiveScan(torch.autograd.Function):
    """(x = s u, s, A, B, C) -> (sum_n C h, last state), one group of channels.

    x, s [b, l, d]; A [n, d]; B, C [b, l, n], or [n, d] when constant. Softplus, skip, gate and groups lie outside
    (scan.py). y [b, l, d]; the last state [b, n, d] carries no gradient, as in the CUDA kernels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, channels = x.shape
        cut = _cut(length, channels, A.shape[0], x.element_size())
        laid = _Laid(cut, x, s, A, B, C)
        y = torch.empty_like(laid.x)
        last = x.new_zeros(batch, A.shape[0], channels)
        keep = any(ctx.needs_input_grad)
        entering = x.new_empty(batch if keep else 0, cut.segments, cut.chunks, A.shape[0], channels)
        for span in cut.spans:
            room = _room(cut, A, span, x, backward=False)
            for row in range(batch):
                state = last[row, :, span]
                for i in range(cut.segments):
                    block = laid.block(row, i, span)
                    block.states(room, state)
                    y[row, i, ..., span] = _over_states(block.C, room.h[1:])
                    state = room.h_at[-1][-1]
                    if keep:
                        entering[row, i, ..., span] = room.h_at[0]
                last[row, :, span] = state
        ctx.save_for_backward(x, s, A, B, C, entering)
        ctx.cut = cut
        ctx.mark_non_differentiable(last)
        return cut.pick(y.squeeze(-2)), last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, s, A, B, C, entering = ctx.saved_tensors
        cut: _Cut = ctx.cut
        laid, g = _Laid(cut, x, s, A, B, C), cut.lay(grads[0])[..., None, :]
        dx, ds, dA = torch.empty_like(laid.x), torch.empty_like(laid.s), torch.zeros_like(A)
        dB, dC = torch.zeros_like(laid.B), torch.zeros_like(laid.C)
        for span in cut.spans:
            room = _room(cut, A, span, x, backward=True)
            for row in range(len(x)):
                back = x.new_zeros(A.shape[0], span.stop - span.start)
                for i in range(cut.segments - 1, -1, -1):
                    block, own = laid.block(row, i, span), g[row, i, ..., span]
                    block.states(room, entering[row, i, ..., span])
                    back = block.adjoint(room, own, back)
                    dx[row, i, ..., span] = _over_states(block.B, room.lam)
                    _part(dC, row, i, span).add_(_over_channels(room.h[1:], own, block.C, room.spare))
                    _part(dB, row, i, span).add_(_over_channels(room.lam, block.x, block.B, room.spare))
                    w = room.lam.mul_(room.a).mul_(room.h[:-1])
                    torch.sum(torch.mul(w, A[:, span], out=room.spare), -2, keepdim=True, out=ds[row, i, ..., span])
                    dA[:, span] += w.mul_(block.s).sum((0, 1))
        grads_of = [m if m.dim() == 2 else cut.pick(m.squeeze(-1)) for m in (dB, dC)]
        return cut.pick(dx.squeeze(-2)), cut.pick(ds.squeeze(-2)), dA, *grads_of


def _room(cut: _Cut, A: Tensor, span: slice, like: Tensor, backward: bool) -> _Room:
    return _Room(cut, A.shape[0], span.stop - span.start, like, backward)


def _part(total: Tensor, row: int, segment: int, span: slice) -> Tensor:
    """Where a block's gradient of B or C belongs: [n, d] forms by channels, others by time."""
    return total[:, span] if total.dim() == 2 else total[row, segment]


def scan(x: Tensor, s: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Typed entry to `SelectiveScan`."""
    y, last = SelectiveScan.apply(x, s, A, B, C)
    return y, last
