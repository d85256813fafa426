"""Encoding and scoring spread over Ray tasks; the one Ray file of evaluation.

Features are written once, in pieces of consecutive items, below a place that every node reads; a task that scores reads
the gallery and the pieces of its queries. The digits do not depend on the number of tasks: pieces are cut at multiples
of the encoding batch, scores are products of one fixed shape (similarity.py), and the queries' terms are added in query
order when the shards are put together (sums.py). Re-ranking needs all queries at once and stays in one process.
"""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reid_dist.errors import UserError
from reid_dist.evaluation.distributed.retrieval import COLLAPSED, Features, Retrieval, Trial, summary
from reid_dist.evaluation.pipeline import Options, rank_pair
from reid_dist.evaluation.ranking import Labels, Scoring
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

    if options.rerank is not None:
        raise UserError("re-ranking needs all queries at once: leave out shards= or rerank=")
    run = ray.remote(num_cpus=1)(_score_share)
    labels, waiting = retrieval.items.labels, []
    for trial in retrieval.trials:
        gallery = ray.put((trial.gallery, labels(trial.selection.gallery)))
        for start, stop in _shards(trial, tasks):
            queries = _Queries(start, trial.query[start:stop], labels(trial.selection.query[start:stop]))
            kinds = (retrieval.query_kind, retrieval.gallery_kind)
            waiting.append(run.remote(stored, kinds, queries, gallery, retrieval.protocol.scoring, options, weights))
    answers = iter(_get(waiting))
    sums = []
    for trial in retrieval.trials:
        parts = [next(answers) for _ in _shards(trial, tasks)]
        if refuse_constant and parts[0][1]:
            raise UserError(COLLAPSED)
        sums.append(RankingSums.merge([part for part, _ in parts]))
    return summary(retrieval, sums, options)


def _shards(trial: Trial, tasks: int) -> list[tuple[int, int]]:
    bounds = np.unique(np.linspace(0, len(trial.query), tasks + 1).astype(int)).tolist()
    return list(itertools.pairwise(bounds))


@dataclass(frozen=True)
class _Queries:
    """A shard: consecutive queries of one trial."""

    first: int
    items: np.ndarray
    labels: Labels


def _score_share(
    stored: StoredFeatures,
    kinds: tuple[str, str],
    queries: _Queries,
    gallery: tuple[np.ndarray, Labels],
    scoring: Scoring,
    options: Options,
    weights: Mapping[str, float] | None,
) -> tuple[RankingSums, bool]:
    """(the shard's sums, whether all gallery features are equal)."""
    query, found = stored.read(kinds[0], queries.items), stored.read(kinds[1], gallery[0])
    sums = rank_pair(
        query, found, queries.labels, gallery[1], scoring, options, weights=weights, first_query=queries.first
    )
    return sums, constant_features(found)


def _get(waiting: list[Any]) -> list[Any]:
    """The tasks' results; what a user can mend is raised as itself, in one line."""
    import ray

    try:
        return list(ray.get(waiting))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (UserError, EvaluationError)):
            raise UserError(str(error.cause)) from None
        raise
