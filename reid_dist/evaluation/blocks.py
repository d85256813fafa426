"""One block of scores [B, G] (greater is better) and the few questions that exact ranking asks of it.

CMC, AP and INP need only the ranks of the true matches, so nothing is sorted by index: hide what takes no part (minus
infinity), then count, per true match, how many scores are at least as high. `HostBlock` counts by comparing the row
with each match (a vector instruction per 16 scores, narrowing to the scores that still matter) and sorts a row only
when it has many matches; `DeviceBlock` does the same on a torch device by sorting row values. Both give equal integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from reid_dist.evaluation.similarity import is_tensor

if TYPE_CHECKING:
    import torch

SORT_ABOVE = 96  # matches in a row from which one value sort is cheaper than one comparison per match
NARROW_BELOW = 0.25  # share of the row that must be left for copying it to pay


class HostBlock:
    """A block in host memory. `scores` [B, G] belongs to the block and is overwritten."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores

    def take(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Scores at the pairs, [n]."""
        return self.scores[rows, cols]

    def hide(self, rows: np.ndarray, cols: np.ndarray) -> None:
        """Leave the pairs out of every later count."""
        self.scores[rows, cols] = -np.inf

    def hide_grid(self, rows: np.ndarray, cols: np.ndarray) -> None:
        """Leave rows x cols out of every later count."""
        self.scores[np.ix_(rows, cols)] = -np.inf

    def count(self, bounds: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many scores of row i are >= each of values[bounds[i]:bounds[i+1]] (descending): int64 [n], and bool [n]:
        one is equal."""
        above = np.zeros(len(values), np.int64)
        tied = np.zeros(len(values), bool)
        flags = np.empty(self.scores.shape[1], bool)
        for i in np.flatnonzero(np.diff(bounds)):
            part = slice(bounds[i], bounds[i + 1])
            if part.stop - part.start > SORT_ABOVE:
                ordered = np.sort(self.scores[i])
                above[part] = len(ordered) - np.searchsorted(ordered, values[part], "left")
                tied[part] = above[part] > len(ordered) - np.searchsorted(ordered, values[part], "right")
            else:
                _count_row(self.scores[i], values[part], above[part], tied[part], flags)
        return above, tied

    def count_ids(self, starts: np.ndarray, best: np.ndarray) -> np.ndarray:
        """int64 [B]: ids (columns from starts[j] to starts[j+1]) whose best score is >= best[i]."""
        return np.count_nonzero(np.maximum.reduceat(self.scores, starts, axis=1) >= best[:, None], axis=1)

    def histogram(self, low: float, high: float, bins: int) -> np.ndarray:
        """int64 [bins]: finite scores by value."""
        shown = self.scores[np.isfinite(self.scores)]
        place = ((shown - low) * (bins / (high - low))).astype(np.int64)
        return np.bincount(np.clip(place, 0, bins - 1), minlength=bins)


def _count_row(row: np.ndarray, values: np.ndarray, above: np.ndarray, tied: np.ndarray, flags: np.ndarray) -> None:
    """Fill `above` and `tied` for one row, lowest value first, so that the row can shrink to what later values can
    see."""
    lower, repeated = -1, False  # the match before this one; whether any two are equal
    for k in range(len(values) - 1, -1, -1):
        value = values[k]
        if lower >= 0 and value == values[lower]:
            above[k], repeated = above[lower], True
            continue
        hits = np.greater_equal(row, value, out=flags[: len(row)])
        above[k] = count = np.count_nonzero(hits)
        if lower >= 0 and above[lower] > count:  # something lies in [values[lower], value): at the lower end itself?
            tied[lower] = np.equal(row, values[lower]).any()
        if count == 0:
            lower = -1
            break
        lower = k
        if k > 2 and count < NARROW_BELOW * len(row):
            row = row.compress(hits)
    if lower >= 0:
        tied[lower] = np.equal(row, values[lower]).any()
    if repeated:  # the flag was found at the lowest place of each run of equal values
        for k in range(len(values) - 2, -1, -1):
            if values[k] == values[k + 1]:
                tied[k] = tied[k + 1]


class DeviceBlock:
    """A block on a torch device; answers come back as NumPy arrays."""

    def __init__(self, scores: torch.Tensor) -> None:
        import torch

        self.scores, self._torch = scores, torch

    def _index(self, x: np.ndarray) -> torch.Tensor:
        return self._torch.as_tensor(x, device=self.scores.device)

    def take(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Scores at the pairs, [n]."""
        return self.scores[self._index(rows), self._index(cols)].cpu().numpy()

    def hide(self, rows: np.ndarray, cols: np.ndarray) -> None:
        """Leave the pairs out of every later count."""
        self.scores[self._index(rows), self._index(cols)] = -np.inf

    def hide_grid(self, rows: np.ndarray, cols: np.ndarray) -> None:
        """Leave rows x cols out of every later count."""
        self.scores[self._index(rows)[:, None], self._index(cols)] = -np.inf

    def count(self, bounds: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `HostBlock.count`."""
        sizes = np.diff(bounds)
        rows = np.repeat(np.arange(len(sizes)), sizes)
        ragged = np.full((len(sizes), max(int(sizes.max(initial=0)), 1)), np.inf, values.dtype)
        at = (rows, np.arange(len(values)) - bounds[rows])
        ragged[at] = values
        ordered, wanted = self.scores.sort(dim=1).values.contiguous(), self._index(ragged)
        width = ordered.shape[1]
        least, more = (
            width - self._torch.searchsorted(ordered, wanted, right=right).cpu().numpy() for right in (False, True)
        )
        return least[at].astype(np.int64), (least > more)[at]

    def count_ids(self, starts: np.ndarray, best: np.ndarray) -> np.ndarray:
        """As `HostBlock.count_ids`."""
        width = self.scores.shape[1]
        owner = self._index(np.repeat(np.arange(len(starts)), np.diff(starts, append=width))).expand_as(self.scores)
        peaks = self.scores.new_full((len(self.scores), len(starts)), -np.inf).scatter_reduce_(
            1, owner, self.scores, "amax"
        )
        counts: np.ndarray = (peaks >= self._index(best)[:, None]).sum(1).cpu().numpy()
        return counts

    def histogram(self, low: float, high: float, bins: int) -> np.ndarray:
        """As `HostBlock.histogram`."""
        return HostBlock(self.scores.cpu().numpy()).histogram(low, high, bins)


def block_of(scores: Any) -> HostBlock | DeviceBlock:
    """The block for scores that lie in host memory or on a device."""
    return DeviceBlock(scores) if is_tensor(scores) else HostBlock(scores)
