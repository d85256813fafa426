"""A protocol applied to a table: which items are encoded once, and how every trial is scored from their features.

Items are images, captions or tracklets. Each is encoded once, however many trials and sides it stands on. A tracklet is
named by its first row; its frames are the rows of its dataset, id and camera with the same tracklet number.
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
from reid_dist.evaluation.pipeline import Options, rank_pair
from reid_dist.evaluation.protocols import Items, Protocol, Selection, combined, num_retrievals, select, tracklets
from reid_dist.evaluation.ranking import JUNK
from reid_dist.evaluation.similarity import EvaluationError, constant_features
from reid_dist.evaluation.sums import RankingSums
from reid_dist.methods.spec import EvalSide

Features = Mapping[str, Mapping[str, Tensor]]  # {kind: {embedding name: [N, D]}}
Permutations = Mapping[tuple[int, int], np.ndarray]  # see protocols.select

COLLAPSED = (
    "all gallery features are the same: the model has collapsed and a score would mean nothing "
    "(allow_constant=true scores it all the same)"
)


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
    rows: np.ndarray  # int64 [N] view row of each item
    shown_pid: np.ndarray  # int64 [N] the dataset's own number of each item's id
    sides: Mapping[str, EvalSide]  # what is encoded, by kind
    query_kind: str
    gallery_kind: str
    trials: tuple[Trial, ...]


def items_of(protocol: Protocol, view: TableView, selection_split: bool, trial: int | None) -> tuple[Items, np.ndarray]:
    """The view's columns for a protocol, and the view row of each item.

    `trial` names one train/test division; None is all that the view has. `selection_split`: the rows are a val split,
    which no protocol names; every row then stands on both sides (the protocol's own removal rule keeps a query from
    finding itself), for text sets as a test row. Raises UserError, EvaluationError.
    """
    number: np.ndarray | None = None
    rows, split = np.arange(len(view), dtype=np.int64), None
    captions = np.array([len(texts) for texts in view.captions], dtype=np.int64)
    if selection_split and captions.any():
        split = np.full(len(view), "test")
    elif selection_split:
        rows, split = np.concatenate([rows, rows]), np.repeat(["query", "gallery"], len(view))
    elif trial is not None or view.num_trials == 1:
        split = view.trial(trial or 0).split
    elif protocol.trial_rule == "column":
        rows, number, split = view.trial_rows()
    else:
        raise UserError(
            f"{view.describe()} has {view.num_trials} train/test divisions and protocol {protocol.name} scores one: "
            "choose a protocol of several trials, or one division with trial=0"
        )
    pid = np.asarray(view.pid)
    if len(np.unique(view.domain)) > 1:  # numbers of two datasets name different people
        pid = np.where(pid == JUNK, JUNK, view.label)
    drawn = protocol.shots or protocol.query.cameras or protocol.gallery.cameras
    items = Items(
        split=np.asarray(split).astype(str),
        pid=pid[rows],
        camid=np.asarray(view.camid)[rows],
        modality=np.asarray(view.modality).astype(str)[rows],
        tracklet=np.asarray(view.tracklet)[rows],
        path=np.array([view.path(int(row)) for row in rows]) if drawn else None,
        trial=number,
        captions=captions[rows] if captions.any() else None,
    )
    if protocol.task == "video":
        items, frames = tracklets(items)
        rows = rows[[group[0] for group in frames]]
    return items, rows


def plan_retrieval(
    protocol: Protocol,
    view: TableView,
    selection_split: bool = False,
    trial: int | None = None,
    permutations: Permutations | None = None,
) -> Retrieval:
    """Which items of `view` the protocol needs, each once; arguments as in `items_of` and `protocols.select`.

    Raises UserError when the view cannot serve it.
    """
    try:
        items, rows = items_of(protocol, view, selection_split, trial)
        selections = [
            select(protocol, items, number, permutations) for number in range(num_retrievals(protocol, items))
        ]
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
    return Retrieval(protocol, items, rows, np.asarray(view.pid)[rows], sides, query_kind, gallery_kind, trials)


def file_retrieval(protocol: Protocol, items: Items, permutations: Permutations | None = None) -> Retrieval:
    """A protocol over the rows of a feature file, which are encoded already (kind "file"). Raises EvaluationError."""
    rows = np.arange(len(items.pid), dtype=np.int64)
    chosen = [select(protocol, items, number, permutations) for number in range(num_retrievals(protocol, items))]
    trials = tuple(Trial(one, one.query, one.gallery) for one in chosen)
    return Retrieval(protocol, items, rows, np.asarray(items.pid), {}, "file", "file", trials)


def encode_all(retrieval: Retrieval, encode: Callable[[EvalSide], Mapping[str, Tensor]]) -> Features:
    """Encode each kind once. `encode(side)` gives named embeddings [N, D] in the side's order."""
    return {kind: encode(side) for kind, side in retrieval.sides.items()}


def _pair(retrieval: Retrieval, features: Features, trial: Trial) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    query = {name: values[trial.query] for name, values in features[retrieval.query_kind].items()}
    gallery = {name: values[trial.gallery] for name, values in features[retrieval.gallery_kind].items()}
    return query, gallery


def score(
    retrieval: Retrieval,
    features: Features,
    weights: Mapping[str, float] | None,
    options: Options,
    refuse_constant: bool = True,
) -> tuple[dict[str, Any], np.ndarray]:
    """The protocol's record (fractions; mean over trials), and the AP of each query of the first trial (NaN: invalid).

    Raises UserError for constant or non-finite features and parameters out of range.
    """
    sums = []
    for trial in retrieval.trials:
        query, gallery = _pair(retrieval, features, trial)
        if refuse_constant and constant_features(gallery):
            raise UserError(COLLAPSED)
        labels = retrieval.items.labels(trial.selection.query), retrieval.items.labels(trial.selection.gallery)
        try:
            sums.append(rank_pair(query, gallery, *labels, retrieval.protocol.scoring, options, weights=weights))
        except EvaluationError as error:
            raise UserError(str(error)) from None
    return summary(retrieval, sums, options)


def summary(retrieval: Retrieval, sums: list[RankingSums], options: Options) -> tuple[dict[str, Any], np.ndarray]:
    """What `score` returns, from each trial's sums. Raises UserError when no query of a trial has a true match."""
    try:
        records = [one.record() for one in sums]
    except EvaluationError as error:
        raise UserError(str(error)) from None
    mean = combined(retrieval.protocol, records)
    first = np.where(sums[0].matches > 0, sums[0].ap, np.nan)
    return {"protocol": retrieval.protocol.name, **mean, **options.record()}, first


def score_beside(
    retrieval: Retrieval,
    other: Retrieval,
    features: Features,
    weights: Mapping[str, float] | None,
    options: Options,
    refuse_constant: bool = True,
) -> dict[str, Any]:
    """The record of another protocol over items that are encoded already: those of `retrieval`, or some of them."""
    places = {}
    for kind, side in retrieval.sides.items():
        known = {key: place for place, key in enumerate(zip(side.rows.tolist(), side.part.tolist(), strict=True))}
        wanted = zip(other.sides[kind].rows.tolist(), other.sides[kind].part.tolist(), strict=True)
        places[kind] = np.array([known[key] for key in wanted], np.int64)
    chosen = {kind: {name: x[places[kind]] for name, x in named.items()} for kind, named in features.items()}
    return score(other, chosen, weights, options, refuse_constant)[0]


def rank_lists(
    retrieval: Retrieval, features: Features, weights: Mapping[str, float], picks: np.ndarray, top: int
) -> list[dict[str, Any]]:
    """The best `top` gallery items of some queries (`picks`, of the first trial), what the protocol removes left out.

    Each is {"query": {row, part, pid, camid}, "top": [{row, part, pid, camid, score, correct}]} with rows of the view.
    Plain similarity, without expansion or re-ranking.
    """
    trial, items, rule = retrieval.trials[0], retrieval.items, retrieval.protocol.scoring
    query, gallery = _pair(retrieval, features, trial)
    cameras = items.camid if items.camid is not None else np.full(len(items.pid), -1)
    room = top + 200 if rule.same_camera or rule.camera_pairs else top
    found = nearest({n: v[picks] for n, v in query.items()}, gallery, min(room, len(trial.gallery)), weights=weights)

    def described(item: int, part: int) -> dict[str, Any]:
        row, pid = int(retrieval.rows[item]), int(retrieval.shown_pid[item])
        return {"row": row, "part": part, "pid": pid, "camid": int(cameras[item])}

    lists = []
    for i, pick in enumerate(picks):
        item = int(trial.selection.query[pick])
        camera = int(cameras[item])
        best: list[dict[str, Any]] = []
        for place, value in zip(found.index[i].tolist(), found.score[i].tolist(), strict=True):
            other = int(trial.selection.gallery[place])
            correct = int(items.pid[item]) == int(items.pid[other])
            removed = (rule.same_camera and camera >= 0 and camera == int(cameras[other]) and correct) or (
                (camera, int(cameras[other])) in rule.camera_pairs
            )
            if not removed and len(best) < top:
                part = int(trial.selection.gallery_part[place])
                best.append({**described(other, part), "score": value, "correct": correct})
        asked = described(item, int(trial.selection.query_part[pick]))
        kinds = {"query_kind": retrieval.query_kind, "gallery_kind": retrieval.gallery_kind}
        lists.append({"query": asked, "top": best, **kinds})
    return lists
