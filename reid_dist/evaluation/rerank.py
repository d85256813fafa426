"""k-reciprocal re-ranking, sparse and exact (Zhong et al., CVPR 2017; steps and numbering of datasets.md 6.9).

The published code keeps four dense N x N matrices, N = queries + gallery, and computes weights in float16. Each row has
only some 20 to 150 non-zeros, so everything after the neighbour search is sparse here, in float32 with float64 sums,
and the distances are computed by blocks and thrown away. It uses the whole test set jointly: label such results "RK",
and never mix parameters in a table (the five papers' code hard-codes k1=50, k2=15; the literature mostly reports 20 and
6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from scipy import sparse

from reid_dist.evaluation.neighbours import nearest_rows
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


class KReciprocal:
    """Re-ranked distances between queries and gallery, by blocks of queries.

    Args:
        query, gallery: [Q, D] and [G, D], or named embeddings with `weights`, as in `rank_features`.
        k1, k2, lambda_value: neighbours, neighbours averaged over, share of the original distance.
        metric: "cosine" (unit length first) or "euclidean" (features as they are); squared distances either way.
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
    ) -> None:
        if k1 < 1 or k2 < 1 or not 0.0 <= lambda_value <= 1.0:
            raise EvaluationError(f"k1={k1}, k2={k2}, lambda={lambda_value}: expected k1, k2 >= 1 and 0 <= lambda <= 1")
        if metric == "dot":
            raise EvaluationError("metric 'dot' is no distance: use 'cosine' or 'euclidean'")
        self.num_query, self.num_gallery = num_rows(query), num_rows(gallery)
        self.lambda_value = lambda_value
        total = self.num_query + self.num_gallery
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
        found = nearest_rows(self._x, self._y, total, total, max(k1 + 1, k2), self._rows, same=True)
        self._farthest = np.maximum(self._offset - 2.0 * found.lowest, np.finfo(np.float32).tiny)
        weights_NN = self._weights(_members(found.index, k1))
        if k2 > 1:
            weights_NN = _average(found.index[:, :k2]) @ weights_NN
        self._query_weights = weights_NN[: self.num_query].tocsr()
        self._gallery_weights = weights_NN[self.num_query :].tocsc()

    def blocks(self) -> Iterator[np.ndarray]:
        """Distances float32 [n, G] of consecutive query blocks (smaller is nearer; negate for `rank_blocks`)."""
        gallery = self._y[self.num_query : self.num_query + self.num_gallery]
        for start, block in score_blocks(self._x, gallery, self.num_query, self.num_gallery, self._rows):
            scores = host(block)
            part = slice(start, start + len(scores))
            scores *= -2.0
            scores += self._offset[part, None]
            np.maximum(scores, 0.0, out=scores)
            scores *= (self.lambda_value / self._farthest[part])[:, None]
            for i in range(len(scores)):
                scores[i] += (1.0 - self.lambda_value) * self._jaccard(start + i)
            yield scores

    def matrix(self) -> np.ndarray:
        """All distances, float32 [Q, G]."""
        return np.concatenate([block.copy() for block in self.blocks()])

    def _jaccard(self, query: int) -> np.ndarray:
        """float32 [G]: 1 - S / (2 - S), S the sum of elementwise minima of two weight rows (each sums to 1)."""
        own = slice(*self._query_weights.indptr[query : query + 2])
        cols, values = self._query_weights.indices[own], self._query_weights.data[own]
        starts = self._gallery_weights.indptr[cols]
        sizes = self._gallery_weights.indptr[cols + 1] - starts
        at = np.arange(sizes.sum()) + np.repeat(starts - np.cumsum(sizes) + sizes, sizes)
        least = np.minimum(self._gallery_weights.data[at], np.repeat(values, sizes))
        shared = np.bincount(self._gallery_weights.indices[at], weights=least, minlength=self.num_gallery)
        distance: np.ndarray = (1.0 - shared / (2.0 - shared)).astype(np.float32)
        return distance

    def _weights(self, members: Any) -> Any:
        """Step 4: exp(-d) over each item's members (d divided by the row's largest), rows summing to 1; CSR float32 [N,
        N]."""
        row = np.repeat(np.arange(members.shape[0]), np.diff(members.indptr))
        col = members.indices
        score = np.empty(len(col), np.float32)
        for start in range(0, len(col), PAIRS):
            part = slice(start, start + PAIRS)
            score[part] = _dots(self._x, self._y, row[part], col[part])
        distance = np.maximum(self._offset[row] - 2.0 * score, 0.0) / self._farthest[row]
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
