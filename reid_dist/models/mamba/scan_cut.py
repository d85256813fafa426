"""How the CPU scan is cut into segments of time and strips of rows and channels (scan_cpu.py), and how arrays are laid out
for it.

Shapes: b batch, d channels, l length, r rows and f features of an array, t = K Q tokens of a segment.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

CHUNK = 4  # Q: tokens that are stepped through
CHUNKS = 4  # K: chunks that advance together
BLOCK_BYTES = 2 * 1024 * 1024  # of one buffer; measured: smaller ones cost more in calls than they gain in cache


@dataclass(frozen=True, slots=True)
class Cut:
    """How a scan is cut: segments of time, each of K chunks of Q tokens; strips of rows and of channels."""

    chunk: int
    chunks: int
    length: int
    segments: int
    rows: tuple[slice, ...]
    spans: tuple[slice, ...]

    @property
    def segment(self) -> int:
        """t: tokens of a segment."""
        return self.chunk * self.chunks

    def lay(self, x: Tensor) -> Tensor:
        """[r, f, l] -> [segments, t, r, f]; the zeros behind the end keep the state and add nothing."""
        padded = x.new_empty(len(x), self.segments * self.segment, x.shape[1])
        for target, source in zip(padded, x, strict=True):  # torch transposes matrices fast, and nothing else
            target[: self.length] = source.T
        if self.length < padded.shape[1]:
            padded[:, self.length :] = 0
        return padded.transpose(0, 1).contiguous().unflatten(0, (self.segments, self.segment))

    def plain(self, laid: Tensor, out: Tensor) -> Tensor:
        """The inverse of `lay`, into `out` [r, f, l]."""
        padded = laid.flatten(0, 1).transpose(0, 1).contiguous()
        for target, source in zip(out, padded, strict=True):
            target.copy_(source[: self.length].T)
        return out

    def chunked(self, x: Tensor) -> Tensor:
        """View [K, Q, ...] of a segment [t, ...]."""
        return x.unflatten(0, (self.chunks, self.chunk))


def _pieces(total: int, size: int) -> tuple[slice, ...]:
    return tuple(slice(start, min(start + size, total)) for start in range(0, total, size))


def cut_scan(batch: int, length: int, channels: int, states: int, itemsize: int) -> Cut:
    """The cut of a scan of [batch, channels, length] with `states` numbers of `itemsize` bytes per channel."""
    chunk = min(CHUNK, length)
    chunks = min(CHUNKS, -(-length // chunk))
    segment = chunks * chunk
    columns = BLOCK_BYTES // (itemsize * segment * states)  # of one buffer: a channel of a row each
    width = -(-channels // -(-channels // max(64, columns // 64 * 64)))  # spans of about equal width
    rows = _pieces(batch, max(1, columns // width))
    return Cut(chunk, chunks, length, -(-length // segment), rows, _pieces(channels, width))
