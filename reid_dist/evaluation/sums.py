"""What a query shard hands back, how shards are put together, and the numbers that a page shows.

The "sums" are kept open as per-query terms and added in query order at the end: floating-point addition depends on its
order, so closed partial sums of 1, 2 and 4 shards would differ in their last digits. A query costs some 60 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reid_dist.evaluation.similarity import EvaluationError

RANKS = (1, 5, 10, 20)


@dataclass(frozen=True)
class RankingSums:
    """Per-query terms of one retrieval (or of a shard of it), n queries in ascending `query` order.

    An invalid query (no true match left) has rank 0 and takes part in no average.
    """

    query: np.ndarray  # int64 [n] index of the query in the whole retrieval
    rank: (
        np.ndarray
    )  # int64 [n, T] rank that decides CMC (of the first match; among ids, if so scored), for each of T draws
    ap: np.ndarray  # float64 [n]
    inp: np.ndarray  # float64 [n] matches / rank of the last match
    matches: np.ndarray  # int64 [n] true matches left
    kept: np.ndarray  # int64 [n] gallery items left
    tied: np.ndarray  # int64 [n] true matches whose score equals that of a negative
    genuine: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # histogram of match scores (ROC)
    impostor: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # histogram of negative scores (ROC)

    @staticmethod
    def merge(parts: Sequence[RankingSums]) -> RankingSums:
        """Shards of one retrieval, in any order. Raises EvaluationError when a query comes twice (padded
        duplicates)."""
        if not parts:
            raise EvaluationError("nothing to merge")
        query = np.concatenate([p.query for p in parts])
        order = np.argsort(query, kind="stable")
        twice = query[order][1:][np.diff(query[order]) == 0]
        if len(twice):
            raise EvaluationError(
                f"query {twice[0]} was scored twice: drop a sampler's padded duplicates before scoring"
            )
        names = ("rank", "ap", "inp", "matches", "kept", "tied")
        joined = {name: np.concatenate([getattr(p, name) for p in parts])[order] for name in names}
        genuine, impostor = (np.sum([getattr(p, name) for p in parts], axis=0) for name in ("genuine", "impostor"))
        return RankingSums(query=query[order], **joined, genuine=genuine, impostor=impostor)

    @property
    def valid(self) -> np.ndarray:
        """bool [n]: queries with at least one true match left. Raises EvaluationError when there is none at all."""
        valid = self.matches > 0
        if not valid.any():
            raise EvaluationError(
                f"none of the {len(valid)} queries has a true match left in the gallery: "
                "check that query and gallery share ids and that the removal rule fits the cameras"
            )
        return valid

    def cmc(self, max_rank: int = 50) -> np.ndarray:
        """float64 [max_rank]: share of valid queries matched within the first k (past the gallery's end: its last
        value)."""
        rank = self.rank[self.valid]
        hits = np.bincount(np.minimum(rank, max_rank + 1).ravel(), minlength=max_rank + 2)[1:-1]
        curve: np.ndarray = np.cumsum(hits) / rank.size
        return curve

    def record(self) -> dict[str, float | int]:
        """rank1 rank5 rank10 rank20 mAP mINP tie_rate chance_rank1 chance_mAP (fractions), num_queries, num_invalid."""
        valid = self.valid
        curve = self.cmc(max(RANKS))
        rank1, mean_ap = chance(self.matches[valid], self.kept[valid])
        return {
            **{f"rank{k}": float(curve[k - 1]) for k in RANKS},
            "mAP": float(self.ap[valid].mean()),
            "mINP": float(self.inp[valid].mean()),
            "num_queries": len(valid),
            "num_invalid": int((~valid).sum()),
            "tie_rate": float(self.tied.sum() / self.matches.sum()),
            "chance_rank1": rank1,
            "chance_mAP": mean_ap,
        }

    def roc(self) -> tuple[np.ndarray, np.ndarray]:
        """(false accept rate, true accept rate), float64 [bins] each, over all kept pairs, from strict to lax
        thresholds."""
        if not len(self.genuine):
            raise EvaluationError("no score histograms were collected: score with roc=True")
        curves = [np.cumsum(h[::-1]) / max(int(h.sum()), 1) for h in (self.impostor, self.genuine)]
        return curves[0], curves[1]


def chance(matches: np.ndarray, kept: np.ndarray) -> tuple[float, float]:
    """Expected (rank-1, mAP) of random scores: R matches among n kept items per query, int [Q] each, R >= 1.

    E[R1] = R/n; E[AP] = (H_n + (R-1)/(n-1) (n - H_n)) / n with H_n the harmonic number (datasets.md 8.3).
    """
    n = kept.astype(np.float64)
    sizes, place = np.unique(kept, return_inverse=True)
    harmonic = np.array([np.sum(1.0 / np.arange(1, size + 1)) for size in sizes])[place]
    spread = np.where(n > 1, (matches - 1) / np.maximum(n - 1, 1), 0.0)
    return float((matches / n).mean()), float(((harmonic + spread * (n - harmonic)) / n).mean())


def average_records(records: Sequence[Mapping[str, Any]], inside: int = 1) -> dict[str, Any]:
    """Mean over trials, plus `num_trials` and the standard deviations `rank1_std` and `mAP_std` over trials
    (population). `inside` consecutive records make one trial: they are averaged before the spread is taken.

    Counts that differ between trials are averaged too, and then no longer whole numbers.
    """
    if not records:
        raise EvaluationError("no trials to average")
    keys = [key for key, value in records[0].items() if isinstance(value, (int, float))]
    columns = {key: np.array([record[key] for record in records], np.float64) for key in keys}
    table = {key: values.reshape(-1, inside).mean(axis=1) for key, values in columns.items()}
    mean: dict[str, Any] = {key: float(values.mean()) for key, values in table.items()}
    for key in keys:
        if key.startswith("num_") and mean[key].is_integer():
            mean[key] = int(mean[key])
    return {
        **mean,
        "num_trials": len(records) // inside,
        "rank1_std": float(table["rank1"].std()),
        "mAP_std": float(table["mAP"].std()),
    }
