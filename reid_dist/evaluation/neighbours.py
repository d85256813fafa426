"""Nearest gallery items of every query, exact and streamed: for rank lists, search, query expansion and re-ranking.

A block's candidates are those at or above the k-th best of every `STRIDE`-th column (a lower bound of the true k-th
best, found on a fraction of the row); each becomes one 64-bit key (row, falling score, column), and one value sort of
the keys orders all rows of the block at once. Equal scores stand in the order of the gallery.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from reid_dist.evaluation.similarity import (
    EvaluationError,
    Features,
    Metric,
    block_rows,
    check_pair,
    combine,
    host,
    num_rows,
    score_blocks,
)

STRIDE = 6
COLUMN_BITS = 23  # of a key: 9 for the row in a block (MAX_ROWS), 32 for the score, the rest for the column


@dataclass(frozen=True)
class Neighbours:
    """The k best gallery items of each query, best first."""

    index: np.ndarray  # int64 [Q, k]
    score: np.ndarray  # float32 [Q, k], greater is nearer
    lowest: np.ndarray  # float32 [Q] the worst score of the whole row


def nearest(
    query: Features,
    gallery: Features,
    k: int,
    *,
    metric: Metric = "cosine",
    weights: Mapping[str, float] | None = None,
    memory_mb: float = 64.0,
) -> Neighbours:
    """The k nearest gallery items ([Q, D] against [G, D], or named embeddings as in `rank_features`).

    The score is the weighted cosine, or the inner product ("dot"), or minus half the squared distance plus half the
    query's squared length ("euclidean"). Raises EvaluationError: k below 1, and as `combine`.
    """
    if k < 1:
        raise EvaluationError(f"k={k}: at least one neighbour must be asked for")
    check_pair(query, gallery)
    g = combine(gallery, "gallery", metric=metric, weights=weights)
    rows = block_rows(len(g), memory_mb)
    q = combine(query, "query", metric=metric, weights=weights, multiple=rows)
    return nearest_rows(q, g, num_rows(query), num_rows(gallery), k, rows)


def nearest_rows(
    q: Any, g: Any, num_query: int, num_gallery: int, k: int, rows: int, same: int | None = None
) -> Neighbours:
    """As `nearest` on matrices of `combine`. `same`: query i is gallery item `same` + i, and its own first neighbour."""
    k = min(k, num_gallery)
    index = np.empty((num_query, k), np.int64)
    score = np.empty((num_query, k), np.float32)
    lowest = np.empty(num_query, np.float32)
    for start, block in score_blocks(q, g, num_query, num_gallery, rows):
        scores = host(block)
        part = slice(start, start + len(scores))
        lowest[part] = scores.min(axis=1)
        if same is not None:
            own = np.arange(len(scores))
            scores[own, same + start + own] = np.inf
        index[part] = _best(scores, k)
        score[part] = np.take_along_axis(scores, index[part], axis=1)
    return Neighbours(index, score, lowest)


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """int64 [n, k]: columns of the k best scores per row, best first, equal ones by column."""
    num, width = scores.shape
    if width > 1 << COLUMN_BITS:
        raise EvaluationError(f"{width} gallery items: at most {1 << COLUMN_BITS} can be searched at once, split them")
    stride = STRIDE if width >= 4 * STRIDE * k else 1
    sample = scores[:, ::stride]
    bound = np.partition(sample, sample.shape[1] - k, axis=1)[:, sample.shape[1] - k]
    flat = np.flatnonzero(scores >= bound[:, None])
    row, col = np.divmod(flat, width)
    bits = (scores[row, col] + np.float32(0)).view(np.uint32)  # + 0 turns -0.0, which equals 0.0, into it
    rising = bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    keys = (row.astype(np.uint64) << np.uint64(32)) | (~rising).astype(np.uint64)
    keys = np.sort((keys << np.uint64(COLUMN_BITS)) | col.astype(np.uint64))
    starts = np.searchsorted(row, np.arange(num))
    best: np.ndarray = (keys[starts[:, None] + np.arange(k)] & np.uint64((1 << COLUMN_BITS) - 1)).astype(np.int64)
    return best
