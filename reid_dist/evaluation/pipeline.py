"""One retrieval with its options: query expansion, then re-ranking, then ranking; every parameter lands in the record.

Expanded and re-ranked scores look at the whole gallery (re-ranking at all queries as well), so they are labelled QE and
RK and never stand unmarked beside plain ones (datasets.md 6.9).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from reid_dist.evaluation.expansion import expand_queries
from reid_dist.evaluation.ranking import Labels, RankingSums, Scoring, rank_blocks, rank_features
from reid_dist.evaluation.rerank import KReciprocal
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

    A shard of the queries gives the digits of the whole, except under re-ranking, which needs all queries at once.
    Raises EvaluationError: parameters out of range, and as `rank_features`.
    """
    memory = options.memory_mb
    if options.expansion is not None:
        check_pair(query, gallery)
        g = combine(gallery, "gallery", weights=weights)[: num_rows(gallery)]
        q = combine(query, "query", weights=weights)[: num_rows(query)]
        query, gallery, weights = expand_queries(q, g, **asdict(options.expansion), memory_mb=memory), g, None
    if options.rerank is not None:
        ranked = KReciprocal(
            query, gallery, **asdict(options.rerank), metric=options.metric, weights=weights, memory_mb=memory
        )
        return rank_blocks((-block for block in ranked.blocks()), query_labels, gallery_labels, scoring)
    return rank_features(
        query,
        gallery,
        query_labels,
        gallery_labels,
        scoring,
        metric=options.metric,
        weights=weights,
        first_query=first_query,
        memory_mb=memory,
    )
