"""Selective scan in plain torch, with a hand-written adjoint (methods/climb.md section 3.1; Gu and Dao 2023, eq. 2).

    h_t = exp(s_t A) h_{t-1} + s_t u_t B_t        y_t = C_t . h_t        (elementwise over the n states of a channel)

Differentiating the textbook loop keeps every h_t and takes one Python step per token. Here time is cut into segments of
K chunks of Q tokens. All chunks of a segment advance together, so a segment costs 2 Q + K short steps, not K * Q:

1. fold    every chunk from state zero, which gives what a chunk adds to the state (one multiply-add per element);
2. carry   h_in[k+1] = added[k] + exp(A * sum of s over chunk k) * h_in[k]     (exact: the decays multiply);
3. seed    every chunk again from its h_in, now keeping h.

The states that enter every other chunk are kept for the backward pass (one in 2 Q tokens), which runs these chunks and then
the others from there, and takes the three steps, right to left, on the adjoint:

    lam_t = g_t C_t + exp(s_{t+1} A) lam_{t+1};   dC = g h;  dB = lam s u;  d(s u) = B . lam;
    w_t = lam_t exp(s_t A) h_{t-1};   ds = A . w + u (B . lam);   dA = sum_t s_t w_t.

Exponents are never positive, so nothing overflows whatever the step sizes are. Some rows of the batch and a range of
channels (a strip) are worked on at a time, as many as fill a buffer; softplus, skip and gate are done strip by strip, too,
and all strips share three buffers, which stay for the next scan. Beyond inputs, outputs and their gradients, memory is
the kept states, what entered the gate, these buffers and a dozen arrays of one strip.

Shapes: b batch, d channels, n states, l length, t tokens of a segment, r rows and w channels of a strip. Inside a segment
arrays are [t, r, n, w]: channels last, since torch vectorises the last axis and step sizes differ by channel.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.models.mamba.scan_cut import Cut, cut_scan

LOG2_E = 1 / math.log(2)
THRESHOLD = 20.0  # softplus is the identity above, as in the kernels and in torch


class _Mixing:
    """B or C for some rows and channels, segment by segment, and how it contracts a segment's [t, r, n, w].

    Of a sequence [r, n, l] `full` is [t, r, n, 1], of a constant [w, n] a view [t, 1, n, w].
    """

    def __init__(self, cut: Cut, given: Tensor) -> None:
        self.constant = given.dim() == 2
        self.laid = given.T.contiguous() if self.constant else cut.lay(given)
        if self.constant:
            self.full = [self.laid.expand(cut.segment, 1, -1, -1)] * cut.segments
        else:
            self.full = list(self.laid.unsqueeze(-1).unbind(0))
            self.flat = [part.flatten(0, 1) for part in self.full]

    def over_states(self, number: int, x: Tensor, out: Tensor) -> None:
        """sum_n of this times x [t r, n, w] -> out [t, r, w]."""
        out = out.flatten(0, 1).unsqueeze(1)
        if self.constant:
            torch.sum(self.laid * x, 1, keepdim=True, out=out)
        else:
            torch.bmm(self.flat[number].mT, x, out=out)

    def over_channels(self, number: int, x: Tensor, g: Tensor, total: Tensor) -> None:
        """Add to the gradient of `laid`, `total`: x [t r, n, w], g [t, r, 1, w]."""
        g = g.flatten(0, 1)
        if self.constant:
            total += (x * g).sum(0)
        else:
            total[number].flatten(0, 1).unsqueeze(1).baddbmm_(g, x.mT)  # twice as fast as x g


class _Room:
    """Buffers of one strip's width, used again by every segment (fresh ones would cost more in page faults than the
    arithmetic), and the views that the steps need, made once.

    a decays, lam adjoint [t, r, n, w]; h states [t + 1, r, n, w], slot i what enters token i; `_at` lists of views
    [K, r, n, w], one per place in a chunk; `first` views without the last chunk, `rest` without the first; the
    chunk-to-chunk parts [K - 1, r, n, w].
    """

    def __init__(self, cut: Cut, lanes: tuple[int, ...], like: Tensor, backward: bool) -> None:
        self.cut, self.lanes, self.backward = cut, lanes, backward  # lanes: (r, n, w)
        self.a = like.new_empty(cut.segment, *lanes)
        self.h = like.new_empty(cut.segment + 1, *lanes)
        self.h_in, self.h_out = self.h[:-1], self.h[1:]
        self.entering = self.h_in[:: cut.chunk]  # [K, r, n, w]
        self.kept = self.entering[::2]
        self.flat_h = self.h_out.flatten(0, 1)  # [t r, n, w]
        self.a_at, self.h_at = (cut.chunked(m).unbind(1) for m in (self.a, self.h_out))
        self.a_first, self.h_first = ([m[:-1] for m in every] for every in (self.a_at, self.h_at))
        self.arriving = like.new_empty(cut.chunks, *lanes)
        self.added, self.decay = self.arriving[:-1], like.new_empty(cut.chunks - 1, *lanes)
        self.links = list(zip(self.added.unbind(0), self.decay.unbind(0), strict=True))
        if backward:
            self.lam = torch.empty_like(self.a)
            self.flat_lam = self.lam.flatten(0, 1)
            self.lam_at = cut.chunked(self.lam).unbind(1)
            self.a_rest, self.lam_rest = ([m[1:] for m in every] for every in (self.a_at, self.lam_at))
            steps = list(zip(self.h_at, self.a_at, strict=True))
            self.even, self.odd = ([(h[i::2], a[i::2]) for h, a in steps] for i in (0, 1))
            self.rates = like.new_empty(1, lanes[1] * lanes[2])
            self.ones = like.new_ones(1, cut.segment * lanes[0])  # a product adds rows faster than sum does

    def serves(self, cut: Cut, lanes: tuple[int, ...], like: Tensor, backward: bool) -> bool:
        """Whether a strip of these sizes, in the type and place of `like`, can be worked on here."""
        same = (self.cut.chunk, self.cut.chunks, self.lanes) == (cut.chunk, cut.chunks, lanes)
        return same and (self.a.dtype, self.a.device) == (like.dtype, like.device) and self.backward >= backward

    def prepare(self, s: Tensor, x: Tensor, rate: Tensor, B: Tensor) -> None:
        """Fill a, and h with what each token adds: s, x = s * u [t, r, 1, w], rate = A log2(e) [n, w], B [t, r, n, 1]."""
        torch.mul(s, rate, out=self.a).exp2_()  # torch's exp2 is several times as fast as its exp
        torch.mul(x, B, out=self.h_out)

    def enter(self, sums: Tensor, rate: Tensor) -> None:
        """Fold and carry: the states that enter the chunks, from that of the first. sums [K, r, 1, w] of s over each."""
        if not self.links:
            return
        last = self.h_first[0]
        for adds, decay in zip(self.h_first[1:], self.a_first[1:], strict=True):
            last = torch.addcmul(adds, decay, last, out=self.added)
        if last is not self.added:
            self.added.copy_(last)
        torch.mul(sums[:-1], rate, out=self.decay).exp2_()
        entering = self.entering.unbind(0)
        for k, (added, decay) in enumerate(self.links):
            torch.addcmul(added, decay, entering[k], out=entering[k + 1])

    def seed(self) -> None:
        """Run every chunk from `entering`; the last state of a chunk is what enters the next and stands there already."""
        before = self.entering
        for h, decay in zip(self.h_at[:-1], self.a_at[:-1], strict=True):
            before = h.addcmul_(decay, before)
        self.h[-1].addcmul_(self.a[-1], self.h[-2])

    def seed_kept(self) -> None:
        """As `seed` from `kept` alone: every other chunk, and then the rest from where these end."""
        before = self.kept
        for h, decay in self.even:
            before = h.addcmul_(decay, before)
        before = self.entering[1::2]
        for h, decay in self.odd[:-1]:
            before = h.addcmul_(decay, before)
        if len(self.entering) % 2 == 0:
            self.h[-1].addcmul_(self.a[-1], self.h[-2])

    def adjoint(self, sums: Tensor, g: Tensor, rate: Tensor, C: Tensor, back: Tensor) -> None:
        """Fill lam, and a with exp(s A) lam, from g [t, r, 1, w], C [t, r, n, 1] and `back` [r, n, w], what the segment
        after sends; it becomes what this one sends."""
        torch.mul(g, C, out=self.lam)
        arriving = self.arriving.unbind(0)
        arriving[-1].copy_(back)
        if self.links:
            first = self.lam_rest[-1]
            for lam, decay in zip(self.lam_rest[-2::-1], self.a_rest[:0:-1], strict=True):
                first = torch.addcmul(lam, decay, first, out=self.added)
            torch.mul(first, self.a_rest[0], out=self.added)
            torch.mul(sums[1:], rate, out=self.decay).exp2_()
            for k in range(len(self.links) - 1, -1, -1):
                self.links[k][0].addcmul_(self.links[k][1], arriving[k + 1])
        self.lam_at[-1].add_(self.arriving)
        after = self.lam_at[-1]
        for lam, decay in zip(self.lam_at[-2::-1], self.a_at[:0:-1], strict=True):
            after = lam.addcmul_(decay, after)
        self.a.mul_(self.lam)
        back.copy_(self.a[0])

    def rates_of(self, s: Tensor, A: Tensor) -> None:
        """With a = exp(s A) lam: w = a h_in; add s . w to `rates` and replace s [t, r, 1, w] by A . w."""
        w = self.a.mul_(self.h_in)
        torch.mul(w, A, out=self.lam)  # lam is not needed any more
        self.rates.addmm_(self.ones, w.mul_(s).flatten(0, 1).flatten(1))
        torch.sum(self.lam, 2, keepdim=True, out=s)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The scan's inputs as they were given: u, delta, z [b, d, l]; A [d, n]; B, C [b, n, l] or [d, n]."""

    cut: Cut
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
    """Rows of the batch and a range of channels: u and s [r, w, l] as given; s and x = s u laid out as segments
    [t, r, 1, w]; sums of s over chunks [K, r, 1, w]; A and rate = A log2(e) [n, w]."""

    def __init__(self, given: _Inputs, rows: slice, span: slice) -> None:
        self.given, self.rows, self.span, cut = given, rows, span, given.cut
        self.u = self.part(given.u)
        self.s = F.softplus(self.raw()) if given.softplus else self.raw()
        self.laid_s, self.laid_x = (cut.lay(m) for m in (self.s, self.s * self.u))
        self.segments = list(zip(*(m.unsqueeze(-2).unbind(0) for m in (self.laid_s, self.laid_x)), strict=True))
        self.sums = self.laid_s.unflatten(1, (cut.chunks, cut.chunk)).sum(2).unsqueeze(-2).unbind(0)
        self.A = given.A[span].T.contiguous()
        self.rate = self.A * LOG2_E
        self.B, self.C = (self._mixing(m) for m in (given.B, given.C))

    def raw(self) -> Tensor:
        """Step sizes before softplus [r, w, l]."""
        raw, bias = self.part(self.given.delta), self.given.bias
        return raw if bias is None else raw + bias[self.span, None]

    def _mixing(self, m: Tensor) -> _Mixing:
        part = m[self.span] if m.dim() == 2 else m[self.rows]
        return _Mixing(self.given.cut, part.to(self.given.A.dtype))

    def part(self, whole: Tensor) -> Tensor:
        """[b, d, l] -> [r, w, l] of this strip, in the type that is computed in."""
        return whole[self.rows, self.span].to(self.given.A.dtype)

    def outputs(self, room: _Room, entering: Tensor | None, out: Tensor) -> Tensor:
        """Fill out [r, w, l] with C . h + D u, and entering [segments, ., r, n, w], the kept states; returns the last
        state [r, n, w]."""
        laid = self.laid_x  # y takes the place of x
        room.h[-1] = 0
        for i, y in enumerate(laid.unbind(0)):
            room.h[0].copy_(room.h[-1])
            s, x = self.segments[i]
            room.prepare(s, x, self.rate, self.B.full[i])
            room.enter(self.sums[i], self.rate)
            if entering is not None:
                entering[i] = room.kept
            room.seed()
            self.C.over_states(i, room.flat_h, y)
        self.given.cut.plain(laid, out)
        if self.given.D is not None:
            out.addcmul_(self.u, self.given.D[self.span, None])
        return room.h[-1]


class _Kept(threading.local):
    """The room that this thread used last, for its next scan of the same size: memory that the allocator gave back to the
    system between two scans would be faulted in again, page by page, which takes a twentieth of their time."""

    room: _Room | None = None

    def get(self, cut: Cut, lanes: tuple[int, ...], like: Tensor, backward: bool) -> _Room:
        room = self.room
        if room is None or not room.serves(cut, lanes, like, backward):
            self.room = None  # its memory first
            with torch.inference_mode(False):  # outside of that mode nothing may write into what is made inside
                self.room = room = _Room(cut, lanes, like, backward)
        return room


_kept = _Kept()


def forget_buffers() -> None:
    """Give back the memory that this thread keeps for its next scan of the same size."""
    _kept.room = None


def _strips(given: _Inputs, backward: bool) -> Iterator[tuple[_Room, _Strip]]:
    """All strips, with the buffers that those of one size share."""
    for span in given.cut.spans:
        for rows in given.cut.rows:
            lanes = (rows.stop - rows.start, given.A.shape[1], span.stop - span.start)
            yield _kept.get(given.cut, lanes, given.A, backward), _Strip(given, rows, span)


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
        cut = cut_scan(batch, length, channels, states, A.element_size())
        given = _Inputs(cut, u, delta, A, B, C, D, z, bias, softplus)
        out, last = A.new_empty(u.shape), A.new_empty(batch, *A.shape)
        keep = any(ctx.needs_input_grad)
        entering = A.new_empty(cut.segments, (cut.chunks + 1) // 2, batch if keep else 0, states, channels)
        ungated = A.new_empty(batch if keep and z is not None else 0, channels, length)
        for room, strip in _strips(given, backward=False):
            rows, span = strip.rows, strip.span
            y = (ungated if len(ungated) else out)[rows, span]
            last[rows, span] = strip.outputs(room, entering[:, :, rows, :, span] if keep else None, y).mT
            if z is not None:
                torch.mul(y, F.silu(strip.part(z)), out=out[rows, span])
            del strip  # before the next one is made
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, entering, ungated)
        ctx.cut, ctx.softplus = cut, softplus
        ctx.mark_non_differentiable(last)
        return out.to(u.dtype), last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, bias, entering, ungated = ctx.saved_tensors
        given = _Inputs(ctx.cut, u, delta, A, B, C, D, z, bias, ctx.softplus)
        result = _Gradients(given)
        for room, strip in _strips(given, backward=True):
            rows, span = strip.rows, strip.span
            y = None if given.z is None else ungated[rows, span]
            result.add(room, strip, grads[0], entering[:, :, rows, :, span], y)
            del strip  # before the next one is made
        return *result.typed(), None


class _Gradients:
    """Gradients of all inputs, filled strip by strip, in the type that is computed in."""

    def __init__(self, given: _Inputs) -> None:
        self.given = given
        self.u, self.delta = (given.A.new_empty(m.shape) for m in (given.u, given.delta))
        self.z = None if given.z is None else torch.empty_like(self.u)
        self.A, self.B, self.C = torch.zeros_like(given.A), torch.zeros_like(given.B), torch.zeros_like(given.C)
        self.D = None if given.D is None else torch.zeros_like(given.D)
        self.bias = None if given.bias is None else torch.zeros_like(given.bias)

    def typed(self) -> tuple[Tensor | None, ...]:
        """In the inputs' order and types."""
        names = ("u", "delta", "A", "B", "C", "D", "z", "bias")
        pairs = ((getattr(self, name), getattr(self.given, name)) for name in names)
        return tuple(None if grad is None else grad.to(value.dtype) for grad, value in pairs)

    def add(self, room: _Room, strip: _Strip, grad: Tensor, entering: Tensor, y: Tensor | None) -> None:
        """One strip. entering [segments, ., r, n, w]: the kept states; y [r, w, l]: what entered the gate."""
        given, rows, span = self.given, strip.rows, strip.span
        g = strip.part(grad)
        if y is not None and given.z is not None and self.z is not None:
            z = strip.part(given.z)
            torch.ops.aten.silu_backward.grad_input(g * y, z, grad_input=self.z[rows, span])
            g = F.silu(z).mul_(g)
        dx, ds = self.u[rows, span], self.delta[rows, span]
        self._scanned(room, strip, entering, given.cut.lay(g), dx, ds)
        ds.addcmul_(strip.u, dx)
        if given.softplus:
            torch.ops.aten.softplus_backward.grad_input(ds, strip.raw(), 1, THRESHOLD, grad_input=ds)
        if self.bias is not None:
            self.bias[span] += ds.sum((0, 2))
        dx.mul_(strip.s)
        if given.D is not None and self.D is not None:
            dx.addcmul_(g, given.D[span, None])
            self.D[span] += (g * strip.u).sum((0, 2))

    def _scanned(self, room: _Room, strip: _Strip, entering: Tensor, g: Tensor, dx: Tensor, ds: Tensor) -> None:
        """Fill dx, ds [r, w, l], the gradients of x = s u, and of s through the decays; add to those of A, B, C.
        entering as in `add`; g [segments, t, r, w], which is used up as are the strip's laid arrays."""
        cut, back = self.given.cut, g.new_zeros(room.lanes)
        dB, dC = torch.zeros_like(strip.B.laid), torch.zeros_like(strip.C.laid)
        room.rates.zero_()
        for i in range(cut.segments - 1, -1, -1):
            (s, x), gi = strip.segments[i], g[i].unsqueeze(-2)
            room.prepare(s, x, strip.rate, strip.B.full[i])
            room.kept.copy_(entering[i])
            room.seed_kept()
            room.adjoint(strip.sums[i], gi, strip.rate, strip.C.full[i], back)
            strip.B.over_channels(i, room.flat_lam, x, dB)
            strip.C.over_channels(i, room.flat_h, gi, dC)
            strip.B.over_states(i, room.flat_lam, g[i])  # what came in for y goes out for x
            room.rates_of(s, strip.A)
        self.A[strip.span] += room.rates.view_as(strip.A).T
        for total, mixing, part in ((self.B, strip.B, dB), (self.C, strip.C, dC)):
            if mixing.constant:
                total[strip.span] += part.T
            else:
                total[strip.rows] += cut.plain(part, torch.empty_like(total[strip.rows]))
        cut.plain(g, dx)
        cut.plain(strip.laid_s, ds)


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Typed entry to `SelectiveScan`."""
    out, last = SelectiveScan.apply(u, delta, A, B, C, D, z, bias, softplus)
    return out, last
