"""Selective scan in plain torch, with a hand-written adjoint (methods/climb.md section 3.1; Gu and Dao 2023, eq. 2).

    h_t = exp(s_t A) h_{t-1} + s_t u_t B_t        y_t = C_t . h_t        (elementwise over the n states of a channel)

Differentiating the textbook loop keeps every h_t and takes one Python step per token. Here time is cut into segments of
K chunks of Q tokens. All chunks of a segment advance together, so a segment costs 2 Q + K short steps, not K * Q:

1. fold    every chunk from state zero, which gives what a chunk adds to the state (one multiply-add per element);
2. carry   h_in[k+1] = added[k] + exp(A * sum of s over chunk k) * h_in[k]     (exact: the decays multiply);
3. seed    every chunk again from its h_in, now keeping h.

The backward pass does the same from the stored state at each segment's start (one in K * Q tokens) and then, right to
left, on the adjoint:

    lam_t = g_t C_t + exp(s_{t+1} A) lam_{t+1};   dC = g h;  dB = lam s u;  d(s u) = B . lam;
    w_t = lam_t exp(s_t A) h_{t-1};   ds = A . w + u (B . lam);   dA = sum_t s_t w_t.

Exponents are never positive, so nothing overflows whatever the step sizes are. Some rows of the batch and a range of
channels (a strip) are worked on at a time, as many as fill a buffer; softplus, skip and gate are done strip by strip, too,
and a strip's segments share three buffers that stay in a core's cache. Beyond inputs, outputs and their gradients, memory
is the stored states, what entered the gate, these buffers and a dozen arrays of one strip.

Shapes: b batch, d channels, n states, l length, T the length padded to whole segments, r rows and w channels of a strip;
inside a segment (Q, K, r, n, w): channels last, since torch vectorises the last axis and step sizes differ by channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    """How a scan is cut: segments of time, each of K chunks of Q tokens; strips of rows and of channels."""

    chunk: int
    chunks: int
    length: int
    segments: int
    rows: tuple[slice, ...]
    spans: tuple[slice, ...]

    @property
    def padded(self) -> int:
        """T."""
        return self.segments * self.chunks * self.chunk

    def lay(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[r, f, l] -> [r, T, f] in `dtype`; the zeros behind the end keep the state and add nothing."""
        laid = torch.empty(len(x), self.padded, x.shape[1], dtype=dtype, device=x.device)
        for target, source in zip(laid, x, strict=True):  # torch transposes matrices fast, and nothing else
            target[: self.length] = source.T
        laid[:, self.length :] = 0
        return laid

    def plain(self, laid: Tensor) -> Tensor:
        """The inverse of `lay`: [r, T, f] -> [r, f, l]."""
        x = laid.new_empty(len(laid), laid.shape[2], self.length)
        for target, source in zip(x, laid, strict=True):
            target.copy_(source[: self.length].T)
        return x

    def segment(self, x: Tensor, number: int) -> Tensor:
        """View [Q, K, r, 1, f] of one segment of a laid out [r, T, f]."""
        size = self.chunks * self.chunk
        part = x[:, number * size : (number + 1) * size]
        return part.unflatten(1, (self.chunks, self.chunk)).permute(2, 1, 0, 3).unsqueeze(3)

    def flat(self, x: Tensor, number: int) -> Tensor:
        """[Q, K, r, f] of a segment -> [r, t, f], t being what of it lies before the end."""
        size = self.chunks * self.chunk
        return x.permute(2, 1, 0, 3).flatten(1, 2)[:, : self.length - number * size]


def _pieces(total: int, size: int) -> tuple[slice, ...]:
    return tuple(slice(start, min(start + size, total)) for start in range(0, total, size))


def _cut(batch: int, length: int, channels: int, states: int, itemsize: int) -> _Cut:
    chunk = min(CHUNK, length)
    chunks = min(CHUNKS, -(-length // chunk))
    segment = chunks * chunk
    columns = BLOCK_BYTES // (itemsize * segment * states)  # of one buffer: a channel of a row each
    width = -(-channels // -(-channels // max(64, columns // 64 * 64)))  # spans of about equal width
    rows = _pieces(batch, max(1, columns // width))
    return _Cut(chunk, chunks, length, -(-length // segment), rows, _pieces(channels, width))


class _Room:
    """Buffers of one strip's width, used again by every segment (fresh ones would cost more in page faults than the
    arithmetic), and the views that the steps need, made once.

    a decays, lam adjoint [Q, K, r, n, w]; h states [Q + 1, K, r, n, w], slot 0 what enters; the chunk-to-chunk
    parts [K - 1, r, n, w]. `first` are views without the last chunk, `rest` without the first.
    """

    def __init__(self, cut: _Cut, lanes: tuple[int, ...], like: Tensor, backward: bool) -> None:
        self.lanes = lanes  # (r, n, w)
        shape = (cut.chunks, *lanes)
        self.a = like.new_empty(cut.chunk, *shape)
        self.h = like.new_empty(cut.chunk + 1, *shape)
        self.added = like.new_empty(cut.chunks - 1, *lanes)
        self.decay = like.new_empty(cut.chunks - 1, *lanes)
        self.a_at, self.h_at = self.a.unbind(0), self.h.unbind(0)
        self.a_first, self.h_first = [a[:-1] for a in self.a_at], [h[:-1] for h in self.h_at[1:]]
        self.entering = self.h_at[0].unbind(0)
        self.links = list(zip(self.added.unbind(0), self.decay.unbind(0), strict=True))
        if backward:
            self.lam = torch.empty_like(self.a)
            self.lam_at = self.lam.unbind(0)
            self.a_rest, self.lam_rest = [a[1:] for a in self.a_at], [x[1:] for x in self.lam_at]
            self.arriving = like.new_empty(shape)
            self.arriving_at = self.arriving.unbind(0)

    def states(self, s: Tensor, x: Tensor, rate: Tensor, B: Tensor, start: Tensor) -> None:
        """Fill a and h of a segment: s, x = s * u [Q, K, r, 1, w], rate = A log2(e) [n, w], B [Q, K, r, n, 1] or [n, w].
        start: the state [r, n, w] at the segment's start (which may be a view of h)."""
        self.entering[0].copy_(start)
        torch.mul(s, rate, out=self.a).exp2_()  # torch's exp2 is three times as fast as its exp
        torch.mul(x, B, out=self.h[1:])
        if self.links:
            self.added.copy_(self.h_first[0])
            for adds, decay in zip(self.h_first[1:], self.a_first[1:], strict=True):
                torch.addcmul(adds, decay, self.added, out=self.added)
            torch.mul(s.sum(0)[:-1], rate, out=self.decay).exp2_()
            for k, (added, decay) in enumerate(self.links):
                torch.addcmul(added, decay, self.entering[k], out=self.entering[k + 1])
        for q, decay in enumerate(self.a_at):
            self.h_at[q + 1].addcmul_(decay, self.h_at[q])

    def adjoint(self, s: Tensor, g: Tensor, rate: Tensor, C: Tensor, start: Tensor) -> Tensor:
        """Fill lam from g [Q, K, r, 1, w] and `start` [r, n, w], what the segment after sends back; returns what this one
        sends."""
        torch.mul(g, C, out=self.lam)
        self.arriving_at[-1].copy_(start)
        if self.links:
            self.added.copy_(self.lam_rest[-1])
            for q in range(len(self.a_at) - 2, -1, -1):
                torch.addcmul(self.lam_rest[q], self.a_rest[q + 1], self.added, out=self.added)
            self.added.mul_(self.a_rest[0])
            torch.mul(s.sum(0)[1:], rate, out=self.decay).exp2_()
            for k in range(len(self.links) - 1, -1, -1):
                added, decay = self.links[k]
                torch.addcmul(added, decay, self.arriving_at[k + 1], out=self.arriving_at[k])
        self.lam_at[-1].add_(self.arriving)
        for q in range(len(self.a_at) - 2, -1, -1):
            self.lam_at[q].addcmul_(self.a_at[q + 1], self.lam_at[q + 1])
        return self.a_at[0][0] * self.lam_at[0][0]


def _over_states(weights: Tensor, x: Tensor) -> Tensor:
    """sum_n weights x: weights [Q, K, r, n, 1] or [n, w], x [Q, K, r, n, w] -> [Q, K, r, 1, w]."""
    if weights.dim() == 2:
        return (weights * x).sum(-2, keepdim=True)
    return weights.mT @ x


def _over_channels(x: Tensor, g: Tensor, like: Tensor) -> Tensor:
    """Gradient of B or C in its form: x [Q, K, r, n, w], g [Q, K, r, 1, w] -> [Q, K, r, n, 1] or [n, w]."""
    if like.dim() == 2:
        return (x * g).sum((0, 1, 2))
    return x @ g.contiguous().mT  # strides (w, 1, w): as (w, 1, 1) the product takes eight times as long


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The scan's inputs as they were given: u, delta, z [b, d, l]; A [d, n]; B, C [b, n, l] or [d, n]."""

    cut: _Cut
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    softplus: bool


class _Strip:
    """Rows of the batch and a range of channels: u, raw (before softplus) and s [r, w, l] as given; s and x = s u laid out
    time first [r, T, w]; A and rate = A log2(e) [n, w]; B, C of every segment [Q, K, r, n, 1], or [n, w] if constant."""

    def __init__(self, given: _Inputs, rows: slice, span: slice) -> None:
        self.given, self.rows, self.span = given, rows, span
        self.u, self.raw = self.part(given.u), self.part(given.delta)
        if given.bias is not None:
            self.raw = self.raw + given.bias[span, None]
        self.s = F.softplus(self.raw) if given.softplus else self.raw
        self.laid_s, self.laid_x = (given.cut.lay(m, m.dtype) for m in (self.s, self.s * self.u))
        self.A = given.A[span].T.contiguous()
        self.rate = self.A * LOG2_E
        self.B, self.C = (self._matrix(m) for m in (given.B, given.C))

    def _matrix(self, m: Tensor) -> list[Tensor]:
        cut = self.given.cut
        if m.dim() == 2:
            return [m[self.span].T] * cut.segments
        laid = cut.lay(m[self.rows], self.given.A.dtype)
        return [cut.segment(laid, i).mT for i in range(cut.segments)]

    def part(self, whole: Tensor) -> Tensor:
        """[b, d, l] -> [r, w, l] of this strip, in the type that is computed in."""
        return whole[self.rows, self.span].to(self.given.A.dtype)

    def states(self, room: _Room, number: int, start: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the room's a and h of a segment; returns its s and x [Q, K, r, 1, w]."""
        s, x = (self.given.cut.segment(m, number) for m in (self.laid_s, self.laid_x))
        room.states(s, x, self.rate, self.B[number], start)
        return s, x

    def outputs(self, room: _Room, entering: Tensor | None) -> tuple[Tensor, Tensor]:
        """(C . h + D u [r, w, l], last state [r, n, w]); fills entering [segments, r, n, w], the state at each start."""
        laid, state = torch.empty_like(self.laid_x), self.u.new_zeros(room.lanes)
        for i in range(self.given.cut.segments):
            if entering is not None:
                entering[i] = state
            self.states(room, i, state)
            self.given.cut.segment(laid, i).copy_(_over_states(self.C[i], room.h[1:]))
            state = room.h_at[-1][-1]
        y = self.given.cut.plain(laid)
        return y if self.given.D is None else y.addcmul_(self.u, self.given.D[self.span, None]), state


def _strips(given: _Inputs, backward: bool) -> Iterator[tuple[_Room, _Strip]]:
    """All strips, with the buffers that those of one size share."""
    for span in given.cut.spans:
        room: _Room | None = None
        for rows in given.cut.rows:
            lanes = (rows.stop - rows.start, given.A.shape[1], span.stop - span.start)
            if room is None or room.lanes != lanes:
                room = _Room(given.cut, lanes, given.A, backward)
            yield room, _Strip(given, rows, span)


class SelectiveScan(torch.autograd.Function):
    """(u, delta, A, B, C, D, z, bias, softplus) -> (out [b, d, l], last state [b, d, n]) of one group of channels.

    Shapes and rules as in scan.selective_scan; A, D, bias in the type that is computed in. The last state carries no
    gradient, as in the CUDA kernels.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        bias: Tensor | None, softplus: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (batch, channels, length), states = u.shape, A.shape[1]
        cut = _cut(batch, length, channels, states, A.element_size())
        given = _Inputs(cut, u, delta, A, B, C, D, z, bias, softplus)
        out, last = torch.empty(u.shape, dtype=u.dtype, device=u.device), A.new_empty(batch, *A.shape)
        keep = any(ctx.needs_input_grad)
        entering = A.new_empty(cut.segments, batch if keep else 0, states, channels)
        ungated = A.new_empty(batch if keep and z is not None else 0, channels, length)
        for room, strip in _strips(given, backward=False):
            rows, span = strip.rows, strip.span
            y, state = strip.outputs(room, entering[:, rows, :, span] if keep else None)
            last[rows, span] = state.mT
            if z is not None:
                if keep:
                    ungated[rows, span] = y
                y.mul_(F.silu(strip.part(z)))
            out[rows, span] = y
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, entering, ungated)
        ctx.cut, ctx.softplus = cut, softplus
        ctx.mark_non_differentiable(last)
        return out, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, bias, entering, ungated = ctx.saved_tensors
        given = _Inputs(ctx.cut, u, delta, A, B, C, D, z, bias, ctx.softplus)
        result = _Gradients(given)
        for room, strip in _strips(given, backward=True):
            rows, span = strip.rows, strip.span
            y = None if given.z is None else ungated[rows, span]
            result.add(room, strip, grads[0], entering[:, rows, :, span], y)
        return result.u, result.delta, result.A, result.B, result.C, result.D, result.z, result.bias, None


class _Gradients:
    """Gradients of all inputs, filled strip by strip."""

    def __init__(self, given: _Inputs) -> None:
        self.given = given
        self.u, self.delta = (torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in (given.u, given.delta))
        self.z = None if given.z is None else torch.empty_like(self.u)
        self.A, self.B, self.C = torch.zeros_like(given.A), torch.zeros_like(given.B), torch.zeros_like(given.C)
        self.D = None if given.D is None else torch.zeros_like(given.D)
        self.bias = None if given.bias is None else torch.zeros_like(given.bias)

    def add(self, room: _Room, strip: _Strip, grad: Tensor, entering: Tensor, y: Tensor | None) -> None:
        """One strip. entering [segments, r, n, w]: the state at each one's start; y [r, w, l]: what entered the gate."""
        given, rows, span = self.given, strip.rows, strip.span
        g = strip.part(grad)
        if y is not None and given.z is not None and self.z is not None:
            z = strip.part(given.z)
            self.z[rows, span] = torch.ops.aten.silu_backward(g * y, z)
            g = F.silu(z).mul_(g)
        laid = given.cut.lay(g, g.dtype)
        dx, ds = torch.empty_like(laid), torch.empty_like(laid)
        back = g.new_zeros(room.lanes)
        for i in range(given.cut.segments - 1, -1, -1):
            back = self._segment(room, strip, i, entering[i], back, laid, dx, ds)
        dx, ds = given.cut.plain(dx), given.cut.plain(ds)
        ds.addcmul_(strip.u, dx)
        if given.softplus:
            ds = torch.ops.aten.softplus_backward(ds, strip.raw, 1, THRESHOLD)
        self.delta[rows, span] = ds
        if self.bias is not None:
            self.bias[span] += ds.sum((0, 2))
        dx.mul_(strip.s)
        if given.D is not None and self.D is not None:
            dx.addcmul_(g, given.D[span, None])
            self.D[span] += (g * strip.u).sum((0, 2))
        self.u[rows, span] = dx

    def _segment(
        self, room: _Room, strip: _Strip, number: int, entering: Tensor, back: Tensor, g: Tensor, dx: Tensor, ds: Tensor
    ) -> Tensor:
        """Fill dx (of x = s u) and ds [r, T, w] of a segment and add to the rest. `back` [r, n, w]: what the segment after
        sends; returns what this one sends."""
        rows, span, cut = strip.rows, strip.span, self.given.cut
        s, x = strip.states(room, number, entering)
        g, dx, ds = (cut.segment(m, number) for m in (g, dx, ds))
        B, C = strip.B[number], strip.C[number]
        back = room.adjoint(s, g, strip.rate, C, back)
        dx.copy_(_over_states(B, room.lam))
        for total, part in ((self.C, _over_channels(room.h[1:], g, C)),
                            (self.B, _over_channels(room.lam, x, B))):  # fmt: skip
            if total.dim() == 2:
                total[span] += part.T
            else:
                start = number * cut.chunk * cut.chunks
                total[rows, :, start : start + cut.chunk * cut.chunks] += cut.flat(part[..., 0], number).mT
        w = room.lam.mul_(room.a).mul_(room.h[:-1])
        ds.copy_(torch.mul(w, strip.A, out=room.a).sum(-2, keepdim=True))  # a is not needed any more
        self.A[span] += w.mul_(s).sum((0, 1, 2)).T
        return back


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Typed entry to `SelectiveScan`."""
    out, last = SelectiveScan.apply(u, delta, A, B, C, D, z, bias, softplus)
    return out, last
