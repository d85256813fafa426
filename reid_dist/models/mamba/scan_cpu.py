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
import torch.nn.functional as F
from torch import Tensor

LOG2_E = 1 / math.log(2)
THRESHOLD = 20.0  # softplus is the identity above, as in the kernels and in torch
CHUNK = 8  # Q: tokens that are stepped through
CHUNKS = 4  # K: chunks that advance together
BLOCK_BYTES = 2 * 1024 * 1024  # of one buffer; measured: smaller ones cost more in calls than they gain in cache


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a scan is cut: segments of time, each of K chunks of Q tokens, and ranges of channels."""

    chunk: int
    chunks: int
    times: tuple[slice, ...]
    spans: tuple[slice, ...]

    def lay(self, x: Tensor) -> Tensor:
        """[t, f] of one segment -> [Q, K, f]; zeros behind the end keep the state and add nothing."""
        missing = self.chunk * self.chunks - len(x)
        if missing:
            x = torch.cat([x, x.new_zeros(missing, x.shape[1])])
        return x.unflatten(0, (self.chunks, self.chunk)).transpose(0, 1).contiguous()

    def pick(self, x: Tensor, time: slice) -> Tensor:
        """The inverse of `lay`."""
        return x.transpose(0, 1).flatten(0, 1)[: time.stop - time.start]


def _cut(length: int, channels: int, states: int, itemsize: int) -> _Cut:
    chunk = min(CHUNK, length)
    chunks = min(CHUNKS, -(-length // chunk))
    segment = chunks * chunk
    width = max(64, BLOCK_BYTES // (itemsize * segment * states) // 64 * 64)
    times = tuple(slice(start, min(start + segment, length)) for start in range(0, length, segment))
    return _Cut(chunk, chunks, times, tuple(slice(c, min(c + width, channels)) for c in range(0, channels, width)))


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


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The scan's inputs as they were given, u, delta, z [b, d, l]; blocks are converted and laid out one at a time."""

    cut: _Cut
    u: Tensor
    delta: Tensor
    A: Tensor  # [d, n]
    B: Tensor  # [b, n, l] or [d, n]
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    softplus: bool

    def part(self, whole: Tensor, row: int, time: slice, span: slice) -> Tensor:
        """[b, d, l] -> [t, d] of one block, in the type that is computed in."""
        return whole[row, span, time].T.to(self.A.dtype)

    def steps(self, row: int, time: slice, span: slice) -> tuple[Tensor, Tensor]:
        """(before softplus, step sizes), both [t, d]."""
        raw = self.part(self.delta, row, time, span)
        if self.bias is not None:
            raw = raw + self.bias[span]
        return raw, F.softplus(raw) if self.softplus else raw

    def block(self, row: int, time: slice, span: slice, s: Tensor, u: Tensor) -> _Block:
        """The block of step sizes s and inputs u [t, d]."""
        B, C = (
            m[span].T if m.dim() == 2 else self.cut.lay(m[row, :, time].T.to(s.dtype))[..., None]
            for m in (self.B, self.C)
        )
        lay = self.cut.lay
        return _Block(lay(s)[:, :, None], lay(s * u)[:, :, None], self.A[span].T.contiguous() * LOG2_E, B, C)

    def room(self, span: slice, backward: bool) -> _Room:
        """Buffers for blocks of this range of channels."""
        return _Room(self.cut, self.A.shape[1], span.stop - span.start, self.A, backward)


class SelectiveScan(torch.autograd.Function):
    """(u, delta, A, B, C, D, z, bias, softplus) -> (out [b, d, l], last state [b, d, n]) of one group of channels.

    Shapes and rules as in scan.selective_scan; A, D, bias in the type that is computed in. The last state carries no
    gradient, as in the CUDA kernels. Softplus, skip and gate are done block by block, so that nothing of the inputs' size
    is kept but the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        bias: Tensor | None, softplus: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch, channels, length = u.shape
        cut = _cut(length, channels, A.shape[1], A.element_size())
        given = _Inputs(cut, u, delta, A, B, C, D, z, bias, softplus)
        out, last = torch.empty_like(u), A.new_empty(batch, *A.shape)
        keep = any(ctx.needs_input_grad)
        entering = A.new_empty(batch if keep else 0, len(cut.times), cut.chunks, A.shape[1], channels)
        for span in cut.spans:
            room = given.room(span, backward=False)
            for row in range(batch):
                state = A.new_zeros(A.shape[1], span.stop - span.start)
                for i, time in enumerate(cut.times):
                    ut = given.part(u, row, time, span)
                    block = given.block(row, time, span, given.steps(row, time, span)[1], ut)
                    block.states(room, state)
                    state = room.h_at[-1][-1]
                    if keep:
                        entering[row, i, ..., span] = room.h_at[0]
                    y = cut.pick(_over_states(block.C, room.h[1:])[:, :, 0], time)
                    y = y if D is None else y.addcmul(ut, D[span])
                    out[row, span, time] = (y if z is None else y * F.silu(given.part(z, row, time, span))).T
                last[row, span] = state.T
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, entering)
        ctx.cut, ctx.softplus = cut, softplus
        ctx.mark_non_differentiable(last)
        return out, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, bias, entering = ctx.saved_tensors
        given = _Inputs(ctx.cut, u, delta, A, B, C, D, z, bias, ctx.softplus)
        result = _Gradients(given)
        for span in ctx.cut.spans:
            room = given.room(span, backward=True)
            for row in range(len(given.u)):
                back = entering.new_zeros(entering.shape[-2], span.stop - span.start)
                for i in range(len(ctx.cut.times) - 1, -1, -1):
                    time = ctx.cut.times[i]
                    back = result.add(room, grads[0], entering[row, i, ..., span], back, row, time, span)
        return result.u, result.delta, result.A, result.B, result.C, result.D, result.z, result.bias, None


class _Gradients:
    """Gradients of all inputs, filled block by block."""

    def __init__(self, given: _Inputs) -> None:
        self.given = given
        self.u, self.delta = torch.empty_like(given.u), torch.empty_like(given.delta)
        self.z = None if given.z is None else torch.empty_like(given.z)
        self.A, self.B, self.C = torch.zeros_like(given.A), torch.zeros_like(given.B), torch.zeros_like(given.C)
        self.D = None if given.D is None else torch.zeros_like(given.D)
        self.bias = None if given.bias is None else torch.zeros_like(given.bias)

    def add(
        self, room: _Room, grad: Tensor, entering: Tensor, back: Tensor, row: int, time: slice, span: slice
    ) -> Tensor:
        """One block. `back` [n, d]: what the segment after sends; returns what this one sends."""
        given, cut = self.given, self.given.cut
        ut, (raw, s) = given.part(given.u, row, time, span), given.steps(row, time, span)
        block = given.block(row, time, span, s, ut)
        block.states(room, entering)
        g = self._through_gate(room, block, given.part(grad, row, time, span), ut, row, time, span)
        laid = cut.lay(g)[:, :, None]
        back = block.adjoint(room, laid, back)
        dx = cut.pick(_over_states(block.B, room.lam)[:, :, 0], time)  # of x = s u
        self._matrix(self.C, _over_channels(room.h[1:], laid, block.C, room.spare), row, time, span)
        self._matrix(self.B, _over_channels(room.lam, block.x, block.B, room.spare), row, time, span)
        w = room.lam.mul_(room.a).mul_(room.h[:-1])
        ds = cut.pick(torch.mul(w, given.A[span].T, out=room.spare).sum(-2), time).addcmul(ut, dx)
        self.A[span] += w.mul_(block.s).sum((0, 1)).T
        du = dx.mul_(s)
        if given.D is not None and self.D is not None:
            du = du.addcmul_(g, given.D[span])
            self.D[span] += (g * ut).sum(0)
        self.u[row, span, time] = du.T
        if given.softplus:
            ds = torch.where(raw > THRESHOLD, ds, ds * raw.sigmoid())
        if self.bias is not None:
            self.bias[span] += ds.sum(0)
        self.delta[row, span, time] = ds.T
        return back

    def _through_gate(
        self, room: _Room, block: _Block, g: Tensor, ut: Tensor, row: int, time: slice, span: slice
    ) -> Tensor:
        """Gradient [t, d] of what enters the gate; fills z's."""
        given = self.given
        if given.z is None or self.z is None:
            return g
        y = given.cut.pick(_over_states(block.C, room.h[1:])[:, :, 0], time)
        y = y if given.D is None else y.addcmul(ut, given.D[span])
        zt = given.part(given.z, row, time, span)
        gate = zt.sigmoid()
        self.z[row, span, time] = (g * y * gate * (1 + zt * (1 - gate))).T
        return g * zt * gate

    def _matrix(self, total: Tensor, part: Tensor, row: int, time: slice, span: slice) -> None:
        """Add a block's gradient of B or C: [n, d] of a constant one, else [Q, K, n, 1]."""
        if total.dim() == 2:
            total[span] += part.T
        else:
            total[row, :, time] += self.given.cut.pick(part[..., 0], time).T


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Typed entry to `SelectiveScan`."""
    out, last = SelectiveScan.apply(u, delta, A, B, C, D, z, bias, softplus)
    return out, last
