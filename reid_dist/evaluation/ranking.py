"""Exact CMC, AP and INP, streamed over query blocks (design section 5; datasets.md 6.1, 6.4, 6.6, 6.8 and 7).

Every peer sorts the indices of all pairs. But the metrics need only the ranks of the true matches: the rank of the k-th
best match is k plus the negatives whose score is at least as high. So a block of queries is multiplied with the
gallery, removed items and the matches themselves are hidden, and what is left above each match is counted (blocks.py).
No Q x G matrix is kept; a tie with a negative counts against the match (pessimistic), so the order of the gallery never
matters and constant features never beat chance; averages are float64.

The gallery is worked on in the order of its ids, so that a query's true matches stand side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from reid_dist.evaluation.blocks import DeviceBlock, HostBlock, block_of
from reid_dist.evaluation.similarity import (
    Array,
    EvaluationError,
    Features,
    Metric,
    block_rows,
    check_pair,
    combine,
    is_tensor,
    on_device,
    score_blocks,
)
from reid_dist.evaluation.sums import RankingSums, average_records, chance

__all__ = [
    "EvaluationError",
    "Labels",
    "RankingSums",
    "Scoring",
    "average_records",
    "chance",
    "rank_blocks",
    "rank_features",
    "rank_scores",
]

JUNK = -1  # pid of junk boxes (datasets.md 6.1): they take no part
NO_CAMERA = -1
ROC_BINS = 20_000


@dataclass(frozen=True, slots=True)
class Labels:
    """Who and where, of one side. `camid` None or -1 means no camera, and takes part in no camera rule."""

    pid: np.ndarray  # int64 [N]
    camid: np.ndarray | None = None  # int64 [N]

    def __post_init__(self) -> None:
        for name, values in (("pid", self.pid), ("camid", self.camid)):
            if values is not None and (np.ndim(values) != 1 or np.asarray(values).dtype.kind not in "iu"):
                raise EvaluationError(
                    f"{name}: expected whole numbers [N], got {np.asarray(values).dtype} {np.shape(values)}"
                )
        if self.camid is not None and len(self.camid) != len(self.pid):
            raise EvaluationError(f"{len(self.pid)} pids but {len(self.camid)} camids")

    def cameras(self) -> np.ndarray:
        """int64 [N], -1 where there is none."""
        return np.full(len(self.pid), NO_CAMERA) if self.camid is None else np.asarray(self.camid)

    def take(self, rows: np.ndarray) -> Labels:
        """The labels of some rows."""
        return Labels(np.asarray(self.pid)[rows], None if self.camid is None else np.asarray(self.camid)[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How a ranked list is judged: what is taken out of it, and what its CMC and AP mean."""

    same_camera: bool = False  # drop gallery items with the query's id *and* camera
    camera_pairs: tuple[tuple[int, int], ...] = ()  # (query camera, gallery camera): drop all of the latter, any id
    unique_ids: bool = False  # CMC over ids, each at its first appearance (SYSU, LLCM)
    gallery_draws: int = 0  # CMC as the mean over this many draws of one gallery image per id (CUHK03 classic)
    draw_seed: int = 0
    trapezoid: bool = False  # AP by the trapezoid rule (Market's MATLAB script); the five papers use the plain sum
    roc: bool = False  # collect score histograms for RankingSums.roc (cosine features only)

    def __post_init__(self) -> None:
        if self.gallery_draws and (self.unique_ids or self.camera_pairs):
            raise EvaluationError("gallery_draws goes with neither unique_ids nor camera_pairs")


def rank_features(
    query: Features,
    gallery: Features,
    query_labels: Labels,
    gallery_labels: Labels,
    scoring: Scoring | None = None,
    *,
    metric: Metric = "cosine",
    weights: Mapping[str, float] | None = None,
    first_query: int = 0,
    memory_mb: float = 64.0,
) -> RankingSums:
    """Rank the gallery for each query by its features.

    Args:
        query, gallery: [Q, D] and [G, D], or named embeddings whose similarities are added with `weights` (default:
            their mean). NumPy, or torch on any device: the work is done where the gallery lies.
        metric: "cosine"; "dot" for inner products of features as they are; "euclidean" for distance as they are.
        first_query: place of the first query in the whole retrieval (of a shard).
        memory_mb: MiB for the block of scores. The digits do not depend on it.
    Raises EvaluationError: lengths or dimensions that differ, values that are not finite.
    """
    scoring = scoring or Scoring()
    if scoring.roc and metric != "cosine":
        raise EvaluationError(f"roc=True needs the cosine, whose range is known; metric is {metric!r}")
    check_pair(query, gallery)
    _same_length("query", query, query_labels)
    _same_length("gallery", gallery, gallery_labels)
    order = _gallery_order(gallery_labels)
    g = combine(gallery, "gallery", metric=metric, weights=weights, order=order)
    rows = block_rows(len(g), memory_mb)
    q = combine(query, "query", metric=metric, weights=weights, multiple=rows)
    blocks = (scores for _, scores in score_blocks(q, g, len(query_labels.pid), len(order), rows))
    span = float(sum(weights.values())) if weights else 1.0
    return _rank(blocks, query_labels, gallery_labels.take(order), scoring, first_query, span)


def rank_scores(
    scores: Array,
    query_labels: Labels,
    gallery_labels: Labels,
    scoring: Scoring | None = None,
    *,
    first_query: int = 0,
    memory_mb: float = 64.0,
) -> RankingSums:
    """Rank by a given matrix [Q, G], greater is better (hand a distance over as its negative); its precision is
    kept."""
    if tuple(scores.shape) != (len(query_labels.pid), len(gallery_labels.pid)):
        expected = (len(query_labels.pid), len(gallery_labels.pid))
        raise EvaluationError(f"scores of shape {tuple(scores.shape)}, labels for {expected}")
    rows = block_rows(scores.shape[1], memory_mb)
    pieces = (scores[start : start + rows] for start in range(0, len(scores), rows))
    return rank_blocks(pieces, query_labels, gallery_labels, scoring, first_query=first_query)


def rank_blocks(
    blocks: Iterator[Array],
    query_labels: Labels,
    gallery_labels: Labels,
    scoring: Scoring | None = None,
    *,
    first_query: int = 0,
) -> RankingSums:
    """As `rank_scores`, from an iterator of consecutive row blocks [B, G], so that the matrix need not exist."""
    scoring = scoring or Scoring()
    if scoring.roc:
        raise EvaluationError("roc=True needs features under the cosine, whose range is known")
    order = _gallery_order(gallery_labels)

    def arranged() -> Iterator[Any]:
        for scores in blocks:
            finite = scores.isfinite() if is_tensor(scores) else np.isfinite(scores)
            if not bool(finite.all()):
                raise EvaluationError(
                    "the scores hold values that are not finite (NaN or infinity): refuse to rank them"
                )
            if on_device(scores):
                yield scores[:, order]
            else:
                yield np.asarray(scores)[:, order]

    return _rank(arranged(), query_labels, gallery_labels.take(order), scoring, first_query, 1.0)


@dataclass(slots=True)
class _Pairs:
    """True matches of a block, flat and in row order."""

    row: np.ndarray
    col: np.ndarray
    score: np.ndarray

    def keep(self, mask: np.ndarray) -> _Pairs:
        return _Pairs(self.row[mask], self.col[mask], self.score[mask])

    def bounds(self, num_rows: int) -> np.ndarray:
        return np.searchsorted(self.row, np.arange(num_rows + 1))


def _rank(
    blocks: Iterator[Any], query: Labels, gallery: Labels, scoring: Scoring, first_query: int, span: float
) -> RankingSums:
    """Rank blocks whose columns follow `gallery`, which is sorted by id."""
    parts, start = [], 0
    for scores in blocks:
        rows = np.arange(start, start + len(scores))
        parts.append(_rank_block(block_of(scores), rows + first_query, query.take(rows), gallery, scoring, span))
        start += len(scores)
    if start != len(query.pid) or start == 0:
        raise EvaluationError(f"scores for {start} queries, labels for {len(query.pid)}; both must be equal and not 0")
    return RankingSums.merge(parts)


def _rank_block(
    block: HostBlock | DeviceBlock, index: np.ndarray, query: Labels, gallery: Labels, scoring: Scoring, span: float
) -> RankingSums:
    size, q_cam, g_cam = len(index), query.cameras(), gallery.cameras()
    pairs, dropped, kept = _matches(block, query, gallery, scoring)
    matches = np.bincount(pairs.row, minlength=size)
    pairs = pairs.keep(np.lexsort((-pairs.score, pairs.row)))
    for camera, other in scoring.camera_pairs:
        block.hide_grid(np.flatnonzero(q_cam == camera), np.flatnonzero(g_cam == other))
    block.hide(dropped.row, dropped.col)
    block.hide(pairs.row, pairs.col)
    bounds = pairs.bounds(size)
    above, tied = block.count(bounds, pairs.score)
    nth = np.arange(len(above)) - bounds[pairs.row] + 1  # 1 for a query's best match
    rank = above + nth
    precision = nth / rank
    if scoring.trapezoid:
        precision = (precision + np.divide(nth - 1, rank - 1, out=np.ones(len(rank)), where=rank > 1)) / 2
    valid = matches > 0
    last = np.zeros(size, np.int64)
    last[valid] = rank[bounds[1:][valid] - 1]
    total = np.bincount(pairs.row, weights=precision, minlength=size)
    genuine, impostor = (
        (_genuine(pairs.score, span), block.histogram(-span, span, ROC_BINS)) if scoring.roc else (None, None)
    )
    sums = RankingSums(
        query=index,
        rank=_cmc_ranks(block, index, query, gallery, scoring, pairs, rank),
        ap=np.divide(total, matches, out=np.zeros(size), where=valid),
        inp=np.divide(matches, last, out=np.zeros(size), where=valid),
        matches=matches,
        kept=kept,
        tied=np.bincount(pairs.row, weights=tied, minlength=size).astype(np.int64),
    )
    return sums if genuine is None or impostor is None else replace(sums, genuine=genuine, impostor=impostor)


def _matches(
    block: HostBlock | DeviceBlock, query: Labels, gallery: Labels, scoring: Scoring
) -> tuple[_Pairs, _Pairs, np.ndarray]:
    """(pairs of equal id that stay, those that the removal rule drops, gallery items left per query)."""
    size, q_cam, g_cam = len(query.pid), query.cameras(), gallery.cameras()
    left, right = (np.searchsorted(gallery.pid, query.pid, side) for side in ("left", "right"))
    counts = np.where(query.pid == JUNK, 0, right - left)
    row = np.repeat(np.arange(size), counts)
    col = np.arange(len(row)) + np.repeat(left - np.cumsum(counts) + counts, counts)
    pairs = _Pairs(row, col, block.take(row, col))
    if not np.isfinite(pairs.score).all():
        raise EvaluationError("scores of true matches overflow: scale the features or use metric='cosine'")
    removed = np.zeros(len(row), bool)
    kept = np.full(size, len(gallery.pid))
    for camera, other in scoring.camera_pairs:
        removed |= (q_cam[row] == camera) & (g_cam[col] == other)
        kept -= (q_cam == camera) * np.count_nonzero(g_cam == other)
    if scoring.same_camera:
        same = (q_cam[row] == g_cam[col]) & (q_cam[row] != NO_CAMERA) & ~removed
        kept -= np.bincount(row[same], minlength=size)
        removed |= same
    return pairs.keep(~removed), pairs.keep(removed), kept


def _cmc_ranks(
    block: HostBlock | DeviceBlock,
    index: np.ndarray,
    query: Labels,
    gallery: Labels,
    scoring: Scoring,
    pairs: _Pairs,
    rank: np.ndarray,
) -> np.ndarray:
    """int64 [B, T] the rank that counts for CMC, 0 for an invalid query. The query's own id is hidden in the block."""
    bounds = pairs.bounds(len(index))
    valid = np.flatnonzero(np.diff(bounds))
    ranks = np.zeros((len(index), max(scoring.gallery_draws, 1)), np.int64)
    if not scoring.unique_ids and not scoring.gallery_draws:
        ranks[valid, 0] = rank[bounds[valid]]
        return ranks
    starts = np.flatnonzero(np.diff(gallery.pid, prepend=gallery.pid[0] - 1))
    if scoring.unique_ids:
        best = np.full(len(index), np.inf, pairs.score.dtype)
        best[valid] = pairs.score[bounds[valid]]
        ranks[valid, 0] = 1 + block.count_ids(starts, best)[valid]
        return ranks
    sizes = np.diff(starts, append=len(gallery.pid))
    for i in valid:
        own = pairs.score[bounds[i] : bounds[i + 1]]
        rng = np.random.Generator(np.random.Philox(key=[scoring.draw_seed, index[i]]))  # not by shard or block
        shown = rng.random((scoring.gallery_draws, len(starts)))
        cols = starts + (shown * sizes).astype(np.int64)
        mine = own[rng.integers(len(own), size=scoring.gallery_draws)]
        others = block.take(np.full(cols.size, i), cols.ravel()).reshape(cols.shape)
        ranks[i] = 1 + np.count_nonzero(others >= mine[:, None], axis=1)
    return ranks


def _gallery_order(gallery: Labels) -> np.ndarray:
    """Gallery rows by id, junk left out. Raises EvaluationError when nothing is left."""
    order = np.argsort(gallery.pid, kind="stable")
    order = order[np.asarray(gallery.pid)[order] != JUNK]
    if not len(order):
        raise EvaluationError("the gallery is empty (junk, pid -1, does not count)")
    return order


def _genuine(scores: np.ndarray, span: float) -> np.ndarray:
    return HostBlock(scores.copy()).histogram(-span, span, ROC_BINS)


def _same_length(side: str, features: Features, labels: Labels) -> None:
    for part in features.values() if isinstance(features, Mapping) else (features,):
        if len(part) != len(labels.pid):
            raise EvaluationError(f"{side}: {len(part)} features but {len(labels.pid)} labels")
