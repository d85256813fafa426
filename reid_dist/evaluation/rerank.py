"""k-reciprocal re-ranking, sparse and exact (Zhong et al., CVPR 2017; steps and numbering of datasets.md 6.9).

The published code keeps four dense N x N matrices, N = queries + gallery, and computes weights in float16. Each row has
only some 20 to 150 non-zeros, so everything after the neighbour search is sparse here, in float32 with float64 sums,
and the distances are computed by blocks and thrown away. It uses the whole test set jointly: label such results "RK",
and never mix parameters in a table (the five papers' code hard-codes k1=50, k2=15; the literature mostly reports 20 and
6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from reid_dist.evaluation.neighbours import Neighbours, nearest_rows
from reid_dist.evaluation.similarity import (
    EvaluationError,
    Features,
    Metric,
    block_rows,
    combine,
    host,
    num_rows,
    on_device,
    score_blocks,
    stack,
)

PAIRS = 16_384  # pairs whose distance is computed at a time


@dataclass(frozen=True)
class Reach:
    """What re-ranking knows of all items once their neighbours are known."""

    query: Any  # float32 CSR [Q, N]: each query's weights over its reciprocal neighbours, summing to 1
    gallery: Any  # float32 CSC [G, N]
    farthest: np.ndarray  # float32 [Q]: distance of each query's farthest item, by which its distances are divided


class KReciprocal:
    """Re-ranked distances between queries and gallery, by blocks of queries.

    `blocks` and `matrix` do everything. Tasks share the work in three steps instead, each with an object made from the
    same features: `neighbours` of a share of the items, `fit` once on those of all, `blocks` of a share of the queries.
    The digits are the same.

    Args:
        query, gallery: [Q, D] and [G, D], or named embeddings with `weights`, as in `rank_features`.
        k1, k2, lambda_value: neighbours, neighbours averaged over, share of the original distance.
        metric: "cosine" (unit length first) or "euclidean" (features as they are); squared distances either way.
        reach: what `fit` returned, when somebody has called it.
    Raises EvaluationError: parameters out of range, features as `combine`.
    """

    def __init__(
        self,
        query: Features,
        gallery: Features,
        *,
        k1: int = 20,
        k2: int = 6,
        lambda_value: float = 0.3,
        metric: Metric = "cosine",
        weights: Mapping[str, float] | None = None,
        memory_mb: float = 64.0,
        reach: Reach | None = None,
    ) -> None:
        if k1 < 1 or k2 < 1 or not 0.0 <= lambda_value <= 1.0:
            raise EvaluationError(f"k1={k1}, k2={k2}, lambda={lambda_value}: expected k1, k2 >= 1 and 0 <= lambda <= 1")
        if metric == "dot":
            raise EvaluationError("metric 'dot' is no distance: use 'cosine' or 'euclidean'")
        self.num_query, self.num_gallery = num_rows(query), num_rows(gallery)
        self.k1, self.k2, self.lambda_value, self._reach = k1, k2, lambda_value, reach
        self.num_items = total = self.num_query + self.num_gallery
        self._rows = block_rows(total, memory_mb)
        everything = stack(query, gallery)
        self._x = combine(everything, "query", metric=metric, weights=weights, multiple=self._rows)
        self._y = self._x if metric == "cosine" else combine(
            everything, "gallery", metric=metric, weights=weights, multiple=self._rows
        )  # fmt: skip
        body = self._x[:total] if metric == "cosine" else self._x[:total, :-1]
        squares = (body * body).sum(1)
        # d(i, j) = offset_i - 2 score(i, j), in both metrics
        self._offset = host(squares) * (2.0 if metric == "cosine" else 1.0)

    def neighbours(self, start: int = 0, stop: int | None = None) -> Neighbours:
        """Nearest items of items start to stop; items are the queries, then the gallery. Each is its own first."""
        stop = self.num_items if stop is None else stop
        reach = max(self.k1 + 1, self.k2)
        return nearest_rows(
            self._from(start, stop), self._y, stop - start, self.num_items, reach, self._rows, same=start
        )

    def fit(self, parts: Sequence[Neighbours]) -> Reach:
        """From the neighbours of all items, in order, cut anywhere."""
        index = np.concatenate([part.index for part in parts])
        lowest = np.concatenate([part.lowest for part in parts])
        if len(index) != self.num_items:
            raise EvaluationError(f"neighbours of {len(index)} items, features of {self.num_items}")
        farthest = np.maximum(self._offset - 2.0 * lowest, np.finfo(np.float32).tiny)
        weights_NN = self._weights(_members(index, self.k1), farthest)
        if self.k2 > 1:
            weights_NN = _average(index[:, : self.k2]) @ weights_NN
        query, gallery = weights_NN[: self.num_query].tocsr(), weights_NN[self.num_query :].tocsc()
        return Reach(query, gallery, farthest[: self.num_query])

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Distances float32 [n, G] of consecutive blocks of queries start to stop (smaller is nearer; negate for
        `rank_blocks`)."""
        stop = self.num_query if stop is None else stop
        if self._reach is None:
            self._reach = self.fit([self.neighbours()])
        reach = self._reach
        gallery = self._y[self.num_query : self.num_items]
        pieces = score_blocks(self._from(start, stop), gallery, stop - start, self.num_gallery, self._rows)
        for offset, block in pieces:
            scores = host(block)
            part = slice(start + offset, start + offset + len(scores))
            scores *= -2.0
            scores += self._offset[part, None]
            np.maximum(scores, 0.0, out=scores)
            scores *= (self.lambda_value / reach.farthest[part])[:, None]
            for i in range(len(scores)):
                scores[i] += (1.0 - self.lambda_value) * self._jaccard(reach, part.start + i)
            yield scores

    def _from(self, start: int, stop: int) -> Any:
        """Rows of the query side from `start` on, with what whole blocks up to `stop` need beyond it."""
        end = start + -(-(stop - start) // self._rows) * self._rows
        rows = self._x[start:end]
        lacking = end - start - len(rows)
        if not lacking:
            return rows
        if not on_device(rows):
            return np.concatenate([rows, np.zeros((lacking, rows.shape[1]), np.float32)])
        import torch

        return torch.cat([rows, rows.new_zeros((lacking, rows.shape[1]))])

    def matrix(self) -> np.ndarray:
        """All distances, float32 [Q, G]."""
        return np.concatenate([block.copy() for block in self.blocks()])

    def _jaccard(self, reach: Reach, query: int) -> np.ndarray:
        """float32 [G]: 1 - S / (2 - S), S the sum of elementwise minima of two weight rows (each sums to 1)."""
        own = slice(*reach.query.indptr[query : query + 2])
        cols, values = reach.query.indices[own], reach.query.data[own]
        starts = reach.gallery.indptr[cols]
        sizes = reach.gallery.indptr[cols + 1] - starts
        at = np.arange(sizes.sum()) + np.repeat(starts - np.cumsum(sizes) + sizes, sizes)
        least = np.minimum(reach.gallery.data[at], np.repeat(values, sizes))
        shared = np.bincount(reach.gallery.indices[at], weights=least, minlength=self.num_gallery)
        distance: np.ndarray = (1.0 - shared / (2.0 - shared)).astype(np.float32)
        return distance

    def _weights(self, members: Any, farthest: np.ndarray) -> Any:
        """Step 4: exp(-d) over each item's members (d divided by the row's largest), rows summing to 1; CSR float32 [N,
        N]."""
        row = np.repeat(np.arange(members.shape[0]), np.diff(members.indptr))
        col = members.indices
        score = np.empty(len(col), np.float32)
        for start in range(0, len(col), PAIRS):
            part = slice(start, start + PAIRS)
            score[part] = _dots(self._x, self._y, row[part], col[part])
        distance = np.maximum(self._offset[row] - 2.0 * score, 0.0) / farthest[row]
        distance[row == col] = 0.0
        weight = np.exp(-distance)
        weight /= np.bincount(row, weights=weight, minlength=members.shape[0])[row]
        return sparse.csr_matrix((weight.astype(np.float32), col, members.indptr), shape=members.shape)


def _members(neighbours: np.ndarray, k1: int) -> Any:
    """Steps 2 and 3: each item's k1-reciprocal set, expanded by its members' half-size sets; CSR pattern [N, N]."""
    full = _reciprocal(neighbours[:, : k1 + 1])
    half = _reciprocal(neighbours[:, : round(k1 / 2) + 1])  # half to even: k1 = 5 uses 2 + 1
    sizes = np.diff(half.indptr)
    overlap = full.multiply(full @ half).tocoo()  # half is symmetric, so its transpose is not needed
    joined = 3 * overlap.data > 2 * sizes[overlap.col]
    added = sparse.csr_matrix(
        (np.ones(joined.sum(), np.int32), (overlap.row[joined], overlap.col[joined])), shape=full.shape
    )
    members = (full + added @ half).tocsr()
    members.sort_indices()
    return members


def _reciprocal(neighbours: np.ndarray) -> Any:
    """int32 CSR [N, N], 1 where i and j are among each other's neighbours [N, k]."""
    forward = _pattern(neighbours, np.ones(neighbours.size, np.int32))
    return forward.multiply(forward.T).tocsr()


def _average(neighbours: np.ndarray) -> Any:
    return _pattern(neighbours, np.full(neighbours.size, 1.0 / neighbours.shape[1], np.float32))


def _pattern(neighbours: np.ndarray, data: np.ndarray) -> Any:
    num, k = neighbours.shape
    return sparse.csr_matrix((data, neighbours.ravel(), np.arange(0, num * k + 1, k)), shape=(num, num))


def _dots(x: Any, y: Any, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    if on_device(x):
        product: np.ndarray = (x[row] * y[col]).sum(1).cpu().numpy()
        return product
    return np.einsum("ij,ij->i", x[row], y[col])
