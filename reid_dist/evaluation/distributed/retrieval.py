"""A protocol applied to a table: which items are encoded once, and how every trial is scored from their features.

Items are images, captions or tracklets. Each is encoded once, however many trials and sides it stands on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from reid_dist.data.store import TableView
from reid_dist.errors import UserError
from reid_dist.evaluation.neighbours import nearest
from reid_dist.evaluation.protocols import Items, Protocol, Selection, num_trials, select
from reid_dist.evaluation.ranking import rank_features
from reid_dist.evaluation.similarity import EvaluationError, constant_features
from reid_dist.evaluation.sums import average_records
from reid_dist.methods.spec import EvalSide

Features = Mapping[str, Mapping[str, Tensor]]  # {kind: {embedding name: [N, D]}}


@dataclass(frozen=True)
class Trial:
    """One trial's two sides as indices into the encoded items."""

    selection: Selection
    query: np.ndarray  # int64 [Q] into the query kind's items
    gallery: np.ndarray  # int64 [G]


@dataclass(frozen=True)
class Retrieval:
    """A protocol over a view, ready to be encoded and scored."""

    protocol: Protocol
    items: Items
    sides: Mapping[str, EvalSide]  # what is encoded, by kind
    query_kind: str
    gallery_kind: str
    trials: tuple[Trial, ...]


def items_of(view: TableView, selection_split: bool = False) -> tuple[Items, np.ndarray]:
    """The view's columns for protocols, and the view row of each item.

    `selection_split`: the rows are a val split, which no protocol names; every row then stands on both sides (the protocol's
    own removal rule keeps a query from finding itself), for text sets as a test row.
    """
    rows = np.arange(len(view), dtype=np.int64)
    split = np.asarray(view.split).astype(str)
    captions = np.array([len(texts) for texts in view.captions], dtype=np.int64)
    if selection_split and captions.any():
        split = np.full(len(view), "test")
    elif selection_split:
        rows = np.concatenate([rows, rows])
        split = np.repeat(["query", "gallery"], len(view))
    return (
        Items(
            split=split,
            pid=np.asarray(view.pid)[rows],
            camid=np.asarray(view.camid)[rows],
            modality=np.asarray(view.modality).astype(str)[rows],
            tracklet=np.asarray(view.tracklet)[rows],
            path=np.array([view.path(int(row)) for row in rows]),
            captions=captions[rows] if captions.any() else None,
        ),
        rows,
    )


def plan_retrieval(protocol: Protocol, view: TableView, selection_split: bool = False) -> Retrieval:
    """Which items of `view` the protocol needs, each once. Raises UserError when the view cannot serve it."""
    items, rows = items_of(view, selection_split)
    try:
        selections = [select(protocol, items, trial) for trial in range(num_trials(protocol, items))]
    except EvaluationError as error:
        raise UserError(f"table {view.describe()}: {error}") from None
    query_kind, gallery_kind = (
        "text" if side.captions else "tracklet" if protocol.task == "video" else "image"
        for side in (protocol.query, protocol.gallery)
    )
    wanted: dict[str, set[tuple[int, int]]] = {}
    keyed = []
    for chosen in selections:
        query = list(zip(rows[chosen.query].tolist(), chosen.query_part.tolist(), strict=True))
        gallery = list(zip(rows[chosen.gallery].tolist(), chosen.gallery_part.tolist(), strict=True))
        wanted.setdefault(query_kind, set()).update(query)
        wanted.setdefault(gallery_kind, set()).update(gallery)
        keyed.append((chosen, query, gallery))
    order = {kind: sorted(keys) for kind, keys in wanted.items()}
    place = {kind: {key: i for i, key in enumerate(keys)} for kind, keys in order.items()}
    sides = {
        kind: EvalSide(kind, np.array([k[0] for k in keys], np.int64), np.array([k[1] for k in keys], np.int64))
        for kind, keys in order.items()
    }
    trials = tuple(
        Trial(
            chosen,
            np.array([place[query_kind][key] for key in query], np.int64),
            np.array([place[gallery_kind][key] for key in gallery], np.int64),
        )
        for chosen, query, gallery in keyed
    )
    return Retrieval(protocol, items, sides, query_kind, gallery_kind, trials)


def encode_all(retrieval: Retrieval, encode: Callable[[EvalSide], Mapping[str, Tensor]]) -> Features:
    """Encode each kind once. `encode(side)` gives named embeddings [N, D] in the side's order."""
    return {kind: encode(side) for kind, side in retrieval.sides.items()}


def _pair(
    retrieval: Retrieval, features: Features, trial: Trial
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    query = {name: values[trial.query] for name, values in features[retrieval.query_kind].items()}
    gallery = {name: values[trial.gallery] for name, values in features[retrieval.gallery_kind].items()}
    return query, gallery


def score(
    retrieval: Retrieval, features: Features, weights: Mapping[str, float], memory_mb: float, refuse_constant: bool = True
) -> tuple[dict[str, Any], np.ndarray]:
    """The protocol's record (fractions; mean over trials), and the AP of each query of the first trial (NaN: invalid).

    Raises UserError for constant or non-finite features.
    """
    records, first = [], np.zeros(0)
    for trial in retrieval.trials:
        query, gallery = _pair(retrieval, features, trial)
        if refuse_constant and constant_features(gallery):
            raise UserError("all gallery features are the same: the model has collapsed, a score would mean nothing")
        try:
            sums = rank_features(
                query,
                gallery,
                retrieval.items.labels(trial.selection.query),
                retrieval.items.labels(trial.selection.gallery),
                retrieval.protocol.scoring,
                weights=weights,
                memory_mb=memory_mb,
            )
            records.append(sums.record())
            if not len(first):
                first = np.where(sums.matches > 0, sums.ap, np.nan)
        except EvaluationError as error:
            raise UserError(str(error)) from None
    mean = records[0] if len(records) == 1 else average_records(records)
    return {"protocol": retrieval.protocol.name, **mean}, first


def rank_lists(
    retrieval: Retrieval, features: Features, weights: Mapping[str, float], rows: np.ndarray, picks: np.ndarray, top: int
) -> list[dict[str, Any]]:
    """The best `top` gallery items of some queries (`picks`, of the first trial), what the protocol removes left out.

    Each is {"query": {row, part, pid, camid}, "top": [{row, pid, camid, score, correct}]}; `rows` maps items to view rows.
    """
    trial, items, rule = retrieval.trials[0], retrieval.items, retrieval.protocol.scoring
    query, gallery = _pair(retrieval, features, trial)
    cameras = items.camid if items.camid is not None else np.full(len(items.pid), -1)
    room = top + 200 if rule.same_camera or rule.camera_pairs else top
    found = nearest({n: v[picks] for n, v in query.items()}, gallery, min(room, len(trial.gallery)), weights=weights)
    lists = []
    for i, pick in enumerate(picks):
        item = int(trial.selection.query[pick])
        pid, camera = int(items.pid[item]), int(cameras[item])
        best: list[dict[str, Any]] = []
        for place, value in zip(found.index[i].tolist(), found.score[i].tolist(), strict=True):
            other = int(trial.selection.gallery[place])
            same_place = camera >= 0 and camera == int(cameras[other])
            removed = (rule.same_camera and same_place and pid == int(items.pid[other])) or (
                (camera, int(cameras[other])) in rule.camera_pairs
            )
            if not removed and len(best) < top:
                part = int(trial.selection.gallery_part[place])
                best.append(
                    {"row": int(rows[other]), "part": part, "pid": int(items.pid[other]), "camid": int(cameras[other]),
                     "score": value, "correct": pid == int(items.pid[other])}
                )  # fmt: skip
        asked = {"row": int(rows[item]), "part": int(trial.selection.query_part[pick]), "pid": pid, "camid": camera}
        kinds = {"query_kind": retrieval.query_kind, "gallery_kind": retrieval.gallery_kind}
        lists.append({"query": asked, "top": best, **kinds})
    return lists
