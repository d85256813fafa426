"""Encoding and scoring spread over Ray tasks; the one Ray file of evaluation.

Features are written once, in pieces of consecutive items, below a place that every node reads; a task that scores reads
the gallery and the pieces of its queries. The digits do not depend on the number of tasks: pieces are cut at multiples
of the encoding batch, scores are products of one fixed shape (similarity.py), and the queries' terms are added in query
order when the shards are put together (sums.py). Re-ranking looks at all queries together, so its tasks come in steps:
neighbours of a share of all items, one task that joins them, distances of a share of the queries.
"""

from __future__ import annotations

import functools
import io
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reid_dist.errors import UserError
from reid_dist.evaluation.distributed.retrieval import COLLAPSED, Features, Retrieval, Trial, summary
from reid_dist.evaluation.neighbours import Neighbours
from reid_dist.evaluation.pipeline import Options, expand, rank_pair, rank_reranked, reranking
from reid_dist.evaluation.ranking import Labels, Scoring
from reid_dist.evaluation.rerank import KReciprocal, Reach
from reid_dist.evaluation.similarity import EvaluationError, constant_features, host
from reid_dist.evaluation.sums import RankingSums
from reid_dist.methods.spec import EvalSide
from reid_dist.storage import cached_file, open_store

logger = logging.getLogger(__name__)

PIECE = 16_384  # rows of a piece that the driver writes
Encoder = Callable[[EvalSide], Mapping[str, Any]]  # named embeddings [n, D] in the side's order


@dataclass(frozen=True)
class StoredFeatures:
    """Features of some kinds of items, in pieces below `place`."""

    place: str
    pieces: Mapping[str, tuple[tuple[int, int], ...]]  # {kind: [(first item, item after the last)]}, in order

    def read(self, kind: str, items: np.ndarray) -> dict[str, np.ndarray]:
        """Named embeddings [n, D] of `items` (int64 [n], any order); only pieces that hold some of them are read."""
        out: dict[str, np.ndarray] = {}
        for start, stop in self.pieces[kind]:
            here = np.flatnonzero((items >= start) & (items < stop))
            if not len(here):
                continue
            with np.load(cached_file(f"{self.place}/{_key(kind, start, stop)}"), allow_pickle=False) as arrays:
                for name in arrays.files:
                    values = arrays[name]
                    if name not in out:
                        out[name] = np.empty((len(items), values.shape[1]), values.dtype)
                    out[name][here] = values[items[here] - start]
        return out

    def all(self) -> Features:
        """Everything, as `encode_all` gives it."""
        return {kind: self.read(kind, np.arange(pieces[-1][1])) for kind, pieces in self.pieces.items()}


def _key(kind: str, start: int, stop: int) -> str:
    return f"{kind}/{start:09d}-{stop:09d}.npz"


def _write(place: str, kind: str, start: int, features: Mapping[str, Any]) -> None:
    arrays = {name: host(values) for name, values in features.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    open_store(place).write(_key(kind, start, start + len(next(iter(arrays.values())))), buffer.getvalue())


def store_features(place: str, features: Features) -> StoredFeatures:
    """Write features that the driver holds."""
    pieces: dict[str, tuple[tuple[int, int], ...]] = {}
    for kind, named in features.items():
        pieces[kind] = _cut(len(next(iter(named.values()))), PIECE)
        for start, stop in pieces[kind]:
            _write(place, kind, start, {name: values[start:stop] for name, values in named.items()})
    return StoredFeatures(place, pieces)


def _cut(count: int, size: int) -> tuple[tuple[int, int], ...]:
    return tuple((start, min(start + size, count)) for start in range(0, count, size))


def encode_sharded(
    place: str, retrieval: Retrieval, make_encoder: Callable[[], Encoder], batch: int, tasks: int
) -> StoredFeatures:
    """Encode each kind once with `tasks` Ray tasks, each on a contiguous share of whole batches.

    Args:
        make_encoder: called in each task; loads the model and opens the view that `retrieval` was planned on.
        batch: rows per forward pass; shares are multiples of it, so a row meets the same batch whatever `tasks` is.
    Raises what `make_encoder` raises. A task takes one CPU, and one GPU where the cluster has some.
    """
    import ray

    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    run = ray.remote(num_cpus=1, num_gpus=gpus)(_encode_share)
    pieces = {
        kind: _cut(len(side.rows), batch * max(1, -(-len(side.rows) // (batch * tasks))))
        for kind, side in retrieval.sides.items()
    }
    shares: list[list[tuple[EvalSide, int]]] = [[] for _ in range(tasks)]
    for kind, side in retrieval.sides.items():
        for number, (start, stop) in enumerate(pieces[kind]):
            shares[number].append((EvalSide(kind, side.rows[start:stop], side.part[start:stop]), start))
    _get([run.remote(place, share, make_encoder) for share in shares if share])
    return StoredFeatures(place, pieces)


def _encode_share(place: str, share: Sequence[tuple[EvalSide, int]], make_encoder: Callable[[], Encoder]) -> None:
    encode = make_encoder()
    for side, start in share:
        _write(place, side.kind, start, encode(side))


def score_sharded(
    retrieval: Retrieval,
    stored: StoredFeatures,
    weights: Mapping[str, float] | None,
    options: Options,
    tasks: int,
    refuse_constant: bool = True,
) -> tuple[dict[str, Any], np.ndarray]:
    """As `retrieval.score`, with the queries of each trial cut into `tasks` Ray tasks. Raises UserError."""
    import ray

    kinds, labels, waiting = (retrieval.query_kind, retrieval.gallery_kind), retrieval.items.labels, []
    for trial in retrieval.trials:
        sides = labels(trial.selection.query), labels(trial.selection.gallery)
        search = ray.put(
            _Search(stored, kinds, trial.query, trial.gallery, *sides, retrieval.protocol.scoring, options, weights)
        )
        waiting.append(_start(search, _shards(trial, tasks), len(trial.query) + len(trial.gallery), options, tasks))
    answers = iter(_get([task for started in waiting for task in started]))
    sums = []
    for started in waiting:
        parts = [next(answers) for _ in started]
        if refuse_constant and parts[0][1]:
            raise UserError(COLLAPSED)
        sums.append(RankingSums.merge([part for part, _ in parts]))
    return summary(retrieval, sums, options)


def _start(search: Any, shards: list[tuple[int, int]], num_items: int, options: Options, tasks: int) -> list[Any]:
    """The tasks of one trial; the last ones, one for each shard of the queries, are returned."""

    def run(task: Callable[..., Any], *args: Any) -> Any:
        return _remote(task).remote(search, *args)

    if options.rerank is None:
        return [run(_score_share, *shard) for shard in shards]
    expanded = [run(_expand_share, *shard) for shard in shards] if options.expansion is not None else []
    near = [run(_neighbours_share, *share, *expanded) for share in _cut(num_items, -(-num_items // tasks))]
    reach = run(_join_shares, len(expanded), *expanded, *near)
    return [run(_score_reranked, *shard, reach, *expanded) for shard in shards]


@functools.cache
def _remote(task: Callable[..., Any]) -> Any:
    import ray

    return ray.remote(num_cpus=1)(task)


def _shards(trial: Trial, tasks: int) -> list[tuple[int, int]]:
    bounds = np.unique(np.linspace(0, len(trial.query), tasks + 1).astype(int)).tolist()
    return list(itertools.pairwise(bounds))


@dataclass(frozen=True)
class _Search:
    """One trial, as each of its tasks sees it."""

    stored: StoredFeatures
    kinds: tuple[str, str]
    query_items: np.ndarray
    gallery_items: np.ndarray
    query_labels: Labels
    gallery_labels: Labels
    scoring: Scoring
    options: Options
    weights: Mapping[str, float] | None

    def query(self, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
        return self.stored.read(self.kinds[0], self.query_items[start:stop])

    def gallery(self) -> dict[str, np.ndarray]:
        return self.stored.read(self.kinds[1], self.gallery_items)

    def labels(self, start: int, stop: int) -> Labels:
        return self.query_labels.take(np.arange(start, stop))

    def reranking(self, gallery: Any, expanded: Sequence[np.ndarray], reach: Reach | None = None) -> KReciprocal:
        query = np.concatenate(expanded) if expanded else self.query()
        return reranking(query, gallery, self.options, self.weights, reach)


def _score_share(search: _Search, start: int, stop: int) -> tuple[RankingSums, bool]:
    """(sums of queries start to stop, whether all gallery features are equal)."""
    found, labels = search.gallery(), (search.labels(start, stop), search.gallery_labels)
    sums = rank_pair(
        search.query(start, stop), found, *labels, search.scoring, search.options, weights=search.weights,
        first_query=start,
    )  # fmt: skip
    return sums, constant_features(found)


def _expand_share(search: _Search, start: int, stop: int) -> np.ndarray:
    """Expanded queries start to stop."""
    return expand(search.query(start, stop), search.gallery(), search.options, search.weights)


def _neighbours_share(search: _Search, start: int, stop: int, *expanded: np.ndarray) -> Neighbours:
    """Neighbours of items start to stop, queries first."""
    return search.reranking(search.gallery(), expanded).neighbours(start, stop)


def _join_shares(search: _Search, num_expanded: int, *parts: Any) -> Reach:
    """Of all items, from the expanded queries (`num_expanded` pieces) and the neighbours."""
    return search.reranking(search.gallery(), parts[:num_expanded]).fit(parts[num_expanded:])


def _score_reranked(
    search: _Search, start: int, stop: int, reach: Reach, *expanded: np.ndarray
) -> tuple[RankingSums, bool]:
    """As `_score_share`, by re-ranked distances."""
    found = search.gallery()
    ranked, labels = search.reranking(found, expanded, reach), search.labels(start, stop)
    sums = rank_reranked(ranked, labels, search.gallery_labels, search.scoring, first_query=start)
    return sums, constant_features(found)


def _get(waiting: list[Any]) -> list[Any]:
    """The tasks' results; what a user can mend is raised as itself, in one line."""
    import ray

    try:
        return list(ray.get(waiting))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError):  # of a task that this one waited for
            cause = cause.cause
        if isinstance(cause, (UserError, EvaluationError)):
            raise UserError(str(cause)) from None
        raise
