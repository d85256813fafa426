"""Tracklets: which rows of a table belong together, as a small table of its own beside the table of frames.

A tracklet is the rows of one dataset, id and camera with the same tracklet number; it is named by any of its rows
(evaluation names it by the first). `<root>/tables/<name>.tracklets.lance` has one row per tracklet, in the order of
first appearance: who, where, which split, and its frames as row numbers of `<name>.lance` in frame order. It is made
from that table and carries its content digest, so that one cannot be taken for another's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from reid_dist.data.store import METADATA, NONE, TableView
from reid_dist.errors import UserError
from reid_dist.storage import StorageError, check_name, lance_options, open_store

_groups: WeakKeyDictionary[TableView, tuple[list[np.ndarray], np.ndarray]] = WeakKeyDictionary()  # a view is fixed
_COLUMNS = ("domain", "pid", "camid", "tracklet", "frame", "split", "modality", "trials")


def tracklets_of(view: TableView, rows: np.ndarray) -> list[np.ndarray]:
    """All rows, in frame order, of the tracklet of each of `rows`: same domain, id, camera and tracklet number."""
    if view not in _groups:
        keys = (view.domain, view.pid, view.camid, view.tracklet)
        _groups[view] = grouped(*(np.asarray(key) for key in keys), frame=np.asarray(view.frame))
    members, group = _groups[view]
    return [members[int(group[row])] for row in rows.tolist()]


def grouped(*keys: np.ndarray, frame: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """(members of each group of equal keys, by `frame` and then place; int64 [N] each place's group)."""
    order = np.lexsort((frame, *keys[::-1]))
    new = np.zeros(len(order), dtype=bool)
    for key in keys:
        new[1:] |= key[order][1:] != key[order][:-1]
    group = np.empty(len(order), dtype=np.int64)
    group[order] = np.cumsum(new)
    return np.split(order, np.flatnonzero(new)), group


def table_name(name: str) -> str:
    """What the tracklet table of table `name` is called."""
    return f"{check_name(name, 'table')}.tracklets"


def write_tracklets(root: str, name: str, content: str) -> int:
    """Make the tracklet table of the image table `name`, whose content digest is `content`. Returns its rows.

    Written whole or not at all, and nothing where the table has no tracklets. Raises StorageError.
    """
    import lance
    import pyarrow as pa

    options = lance_options(_uri(root, name)) or None
    images = lance.dataset(_uri(root, name, frames=True), storage_options=options)
    columns = images.to_table(columns=list(_COLUMNS))
    has = np.flatnonzero(columns["tracklet"].is_valid().to_numpy(zero_copy_only=False))
    if not len(has):
        return 0
    rows = _rows(columns, has)
    facts = {METADATA: json.dumps({"frames_of": content}).encode()}
    table = pa.Table.from_pylist(rows, _schema().with_metadata(facts))
    try:
        lance.write_dataset(table, _uri(root, name), mode="overwrite", storage_options=options)
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise StorageError(f"{_uri(root, name)}: the tracklet table could not be written: {reason}") from None
    return len(rows)


def _schema() -> Any:
    import pyarrow as pa

    numbers, words = pa.list_(pa.int64()), pa.list_(pa.string())
    kinds = {"tracklet": pa.int64(), "pid": pa.int64(), "camid": pa.int64(), "domain": pa.string(),
             "modality": pa.string(), "split": pa.string(), "trials": words, "length": pa.int64(), "rows": numbers}  # fmt: skip
    return pa.schema([pa.field(name, kind, nullable=name == "camid") for name, kind in kinds.items()])


def _rows(columns: Any, has: np.ndarray) -> list[dict[str, Any]]:
    """One row per tracklet, from the columns of the frames `has`."""
    numbers = {n: columns[n].fill_null(NONE).to_numpy()[has] for n in ("pid", "camid", "tracklet", "frame")}
    domain = np.array(columns["domain"].to_pylist(), dtype=np.str_)[has]
    members, _ = grouped(domain, *(numbers[n] for n in ("pid", "camid", "tracklet")), frame=numbers["frame"])
    members.sort(key=lambda group: int(group.min()))
    first = has[[group[0] for group in members]]
    told = columns.select(["tracklet", "pid", "camid", "domain", "modality", "split", "trials"]).take(first).to_pylist()
    return [
        {**row, "length": len(group), "rows": has[group].tolist()} for row, group in zip(told, members, strict=True)
    ]


def read_tracklets(root: str, name: str, content: str) -> list[dict[str, Any]]:
    """The rows of a table's tracklet table: {"tracklet", "pid", "camid", "split", ..., "length", "rows"}.

    Raises UserError when there is none, or one of another content of that table.
    """
    import lance

    if not has_tracklets(root, name, content):
        raise UserError(f"table {name!r} under {root} has no tracklet table, or an older one: pack it again")
    dataset = lance.dataset(_uri(root, name), storage_options=lance_options(_uri(root, name)) or None)
    rows: list[dict[str, Any]] = dataset.to_table().to_pylist()
    return rows


def has_tracklets(root: str, name: str, content: str) -> bool:
    """Whether the tracklet table of this very content is there."""
    import lance

    uri = _uri(root, name)
    if not open_store(uri).list("_versions/"):
        return False
    found: Mapping[bytes, bytes] = lance.dataset(uri, storage_options=lance_options(uri) or None).schema.metadata or {}
    return bool(json.loads(found.get(METADATA, b"{}")).get("frames_of") == content)


def _uri(root: str, name: str, frames: bool = False) -> str:
    return f"{open_store(root).uri}/tables/{check_name(name, 'table') if frames else table_name(name)}.lance"
