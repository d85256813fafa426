"""Scoring a feature file, and what it shares with scoring a run: protocol, published draws, the place of shards."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jobs._words import FileOptions, ScoreOptions, pipeline_options
from reid_dist.errors import UserError
from reid_dist.evaluation import protocols
from reid_dist.evaluation.similarity import EvaluationError

MEMORY_MB = 256.0


def get_protocol(name: str) -> protocols.Protocol:
    """Raises UserError that lists all names."""
    try:
        return protocols.get(name)
    except EvaluationError as error:
        raise UserError(str(error)) from None


def permutations_of(options: ScoreOptions, protocol: protocols.Protocol) -> Mapping[tuple[int, int], Any] | None:
    """The published draws that `permutations=` names. Raises UserError."""
    if not options.permutations:
        return None
    if not protocol.shots:
        raise UserError(
            f"permutations= goes with the SYSU protocols, which draw their gallery; not with {protocol.name}"
        )
    from reid_dist.evaluation.permutations import read_permutations
    from reid_dist.storage import cached_file

    try:
        return read_permutations(cached_file(options.permutations))
    except EvaluationError as error:
        raise UserError(str(error)) from None


def or_refusal(score: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record of a convention beside the one that was asked for; where it cannot be scored, the reason."""
    try:
        return score()
    except (UserError, EvaluationError) as error:
        return {"refused": str(error)}


@contextlib.contextmanager
def shard_place(options: ScoreOptions, usual: str) -> Iterator[str]:
    """A folder for the length of a sharded job, below `store=`, else below `usual`, else on this machine's disk.

    Raises UserError when a shared cluster is used and no place is known that its nodes reach.
    """
    from reid_dist.storage import open_store

    parent = options.store or usual
    if not parent and os.environ.get("RAY_ADDRESS"):
        raise UserError("shards= on a cluster needs store=URI, a folder or s3:// prefix that all its nodes reach")
    with tempfile.TemporaryDirectory(prefix="reid-shards-") as folder:
        name = f"shards-{uuid.uuid4().hex[:12]}"
        place = open_store(parent or folder)
        try:
            yield place.sub(name).uri
        finally:
            place.delete_tree(name)


def score_file(path: str, options: FileOptions) -> dict[str, Any]:
    """Score anybody's features; returns the record. Raises UserError."""
    from reid_dist.evaluation.featurefile import pool_tracklets, read_features

    if not options.protocol:
        raise UserError(f"--features needs --protocol NAME: one of {', '.join(protocols.PROTOCOLS)}")
    protocol = get_protocol(options.protocol)
    from reid_dist.storage import cached_file

    try:
        items, feat = read_features(cached_file(path) if "://" in path else path, protocol)
        if protocol.task == "video" and items.tracklet is not None:
            items, feat = pool_tracklets(items, feat)
        record = _score_items(protocol, items, feat, options)
        if protocol.beside:
            other = get_protocol(protocol.beside)
            record["beside"] = {other.name: or_refusal(lambda: _score_items(other, items, feat, options))}
    except EvaluationError as error:
        raise UserError(str(error) if path in str(error) else f"{path}: {error}") from None
    return {"features": path, "num_items": len(feat), "dim": feat.shape[1], **record}


def _score_items(
    protocol: protocols.Protocol, items: protocols.Items, feat: Any, options: FileOptions
) -> dict[str, Any]:
    from reid_dist.evaluation.similarity import constant_features

    draws, settings = permutations_of(options, protocol), pipeline_options(options, MEMORY_MB)
    if not options.allow_constant and constant_features(feat):
        raise UserError(
            "all features are the same: a score would mean nothing (allow_constant=true scores them all the same)"
        )
    if not options.shards:
        record = protocols.evaluate(protocol, items, {"feat": feat}, options=settings, permutations=draws)
        return record | settings.record()
    from jobs._cluster import connect
    from reid_dist.evaluation.distributed.retrieval import file_retrieval
    from reid_dist.evaluation.distributed.shards import score_sharded, store_features

    retrieval = file_retrieval(protocol, items, draws)
    with shard_place(options, "") as place, connect(options.shards):
        stored = store_features(place, {"file": {"feat": feat}})
        record, _ = score_sharded(retrieval, stored, None, settings, options.shards, not options.allow_constant)
    return record | {"shards": options.shards}
