"""One retrieval with its options: query expansion, then re-ranking, then ranking; every parameter lands in the record.

Expanded and re-ranked scores look at the whole gallery (re-ranking at all queries as well), so they are labelled QE and
RK and never stand unmarked beside plain ones (datasets.md 6.9).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from reid_dist.evaluation.expansion import expand_queries
from reid_dist.evaluation.ranking import Labels, RankingSums, Scoring, rank_blocks, rank_features
from reid_dist.evaluation.rerank import KReciprocal, Reach
from reid_dist.evaluation.similarity import EvaluationError, Features, Metric, check_pair, combine, num_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerank:
    """k-reciprocal re-ranking (rerank.py). Mostly reported with these; the papers' code hard-codes 50, 15, 0.3."""

    k1: int = 20
    k2: int = 6
    lambda_value: float = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Expansion:
    """Query expansion (expansion.py)."""

    k: int = 5
    alpha: float = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How features become ranks, beside the protocol."""

    metric: Metric = "cosine"
    rerank: Rerank | None = None
    expansion: Expansion | None = None
    memory_mb: float = 64.0  # of one block of scores; changes no digit

    def __post_init__(self) -> None:
        if self.expansion is not None and self.metric != "cosine":
            raise EvaluationError(f"query expansion works on the cosine, not on metric {self.metric!r}")

    @property
    def label(self) -> str:
        """ "", "QE", "RK" or "QE+RK": what such a result is called beside a plain one."""
        return "+".join(name for name, on in (("QE", self.expansion), ("RK", self.rerank)) if on is not None)

    def record(self) -> dict[str, Any]:
        """metric, label and the parameters of expansion and re-ranking (None when off)."""
        steps = {"rerank": self.rerank, "expansion": self.expansion}
        return {
            "metric": self.metric,
            "label": self.label,
            **{name: None if step is None else asdict(step) for name, step in steps.items()},
        }


def rank_pair(
    query: Features,
    gallery: Features,
    query_labels: Labels,
    gallery_labels: Labels,
    scoring: Scoring,
    options: Options,
    *,
    weights: Mapping[str, float] | None = None,
    first_query: int = 0,
) -> RankingSums:
    """Rank the gallery for each query with `options`. Arguments as in `rank_features`.

    A shard of the queries gives the digits of the whole, except under re-ranking, which needs all queries at once:
    there `expand`, `reranking` and `rank_reranked` are what a shard does. Raises EvaluationError: parameters out of
    range, and as `rank_features`.
    """
    if options.expansion is not None:
        query = expand(query, gallery, options, weights)
    if options.rerank is not None:
        return rank_reranked(reranking(query, gallery, options, weights), query_labels, gallery_labels, scoring)
    gallery, weights = searched(gallery, options, weights)
    return rank_features(
        query,
        gallery,
        query_labels,
        gallery_labels,
        scoring,
        metric=options.metric,
        weights=weights,
        first_query=first_query,
        memory_mb=options.memory_mb,
    )


def expand(query: Features, gallery: Features, options: Options, weights: Mapping[str, float] | None) -> np.ndarray:
    """Expanded queries, float32 [Q, D'], to be compared with `searched(gallery)`. Raises EvaluationError."""
    check_pair(query, gallery)
    assert options.expansion is not None
    q = combine(query, "query", weights=weights)[: num_rows(query)]
    one, _ = searched(gallery, options, weights)
    return expand_queries(q, one, **asdict(options.expansion), memory_mb=options.memory_mb)


def searched(
    gallery: Features, options: Options, weights: Mapping[str, float] | None
) -> tuple[Features, Mapping[str, float] | None]:
    """(gallery, weights) as they are searched: after query expansion embeddings are one matrix without weights."""
    if options.expansion is None:
        return gallery, weights
    return combine(gallery, "gallery", weights=weights)[: num_rows(gallery)], None


def reranking(
    query: Features,
    gallery: Features,
    options: Options,
    weights: Mapping[str, float] | None,
    reach: Reach | None = None,
) -> KReciprocal:
    """The re-ranking that `options` ask for; `query` expanded, if they ask for that. Raises EvaluationError."""
    assert options.rerank is not None
    gallery, weights = searched(gallery, options, weights)
    steps = asdict(options.rerank)
    return KReciprocal(
        query, gallery, **steps, metric=options.metric, weights=weights, memory_mb=options.memory_mb, reach=reach
    )


def rank_reranked(
    ranked: KReciprocal, query_labels: Labels, gallery_labels: Labels, scoring: Scoring, *, first_query: int = 0
) -> RankingSums:
    """Rank by re-ranked distances the queries of `query_labels`, of which the first is `first_query` of all."""
    blocks = ranked.blocks(first_query, first_query + len(query_labels.pid))
    return rank_blocks((-block for block in blocks), query_labels, gallery_labels, scoring, first_query=first_query)
