"""Side tables: knowledge about images that comes later (captions, masks, attributes), joined by content, never by row.

A side table is `<root>/tables/<name>.side.lance`. Its key columns hold digests (hex SHA-256 of the encoded image, of a
caption text), so a new one never rewrites images, and fits every table that holds the same images. What the tables of one
kind hold is said where they are read: caption groups (RDA) in data/captions.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from reid_dist.data.store import METADATA
from reid_dist.errors import UserError
from reid_dist.storage import check_name, is_remote, lance_options, open_store
from reid_dist.storage.cache import NodeCache


@dataclass(frozen=True, slots=True, eq=False)
class SideTable:
    """An opened side table."""

    name: str
    version: int
    keys: tuple[str, ...]
    facts: Mapping[str, Any]
    index: Mapping[tuple[str, ...], int]
    dataset: Any

    def lookup(self, keys: Sequence[tuple[str, ...]], columns: Sequence[str]) -> list[dict[str, Any] | None]:
        """The `columns` of every key (one digest per key column), None where the table has no such row. One take."""
        rows = [self.index.get(key) for key in keys]
        present = sorted({row for row in rows if row is not None})
        taken = self.dataset.take(present, columns=list(columns)).to_pylist() if present else []
        found = dict(zip(present, taken, strict=True))
        return [None if row is None else found[row] for row in rows]


def _uri(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/tables/{check_name(name, 'side table')}.side.lance"


def write_side_table(root: str, name: str, rows: pa.Table, keys: Sequence[str], facts: Mapping[str, Any]) -> int:
    """Publish `rows` as the next version of a side table, whole or not at all; returns the version.

    `keys` names the digest columns that identify a row. Raises UserError for missing key columns and doubled keys.
    """
    import lance

    missing = [key for key in keys if key not in rows.column_names]
    if missing or not keys:
        raise UserError(f"side table {name}: key column {', '.join(missing) or '(none given)'} is missing")
    pairs = list(zip(*(rows[key].to_pylist() for key in keys), strict=True))
    if len(set(pairs)) != len(pairs) or any(value is None for pair in pairs for value in pair):
        raise UserError(f"side table {name}: two rows share a key, or a key is empty")
    uri = open_store(_uri(root, name)).uri
    content = json.dumps({"keys": list(keys), "facts": dict(facts)}, sort_keys=True).encode()
    stamped = rows.replace_schema_metadata({METADATA: content})
    dataset = lance.write_dataset(stamped, uri, mode="overwrite", storage_options=lance_options(uri) or None)
    return int(dataset.version)


def open_side_table(root: str, name: str, version: int | None = None, cache: NodeCache | None = None) -> SideTable:
    """Open a side table (newest version by default), through the node cache when it is remote. Raises UserError."""
    import lance

    uri = _uri(root, name)
    store = open_store(uri)
    if not store.list("_versions/"):
        raise UserError(f"there is no side table {name!r} under {root}")
    place = (cache or NodeCache()).tree(store) if is_remote(uri) else store.uri
    try:
        dataset = lance.dataset(place, version=version)
    except (OSError, ValueError):
        raise UserError(f"side table {name} under {root} has no version {version}") from None
    content = json.loads(dataset.schema.metadata[METADATA])
    keys = tuple(content["keys"])
    columns = dataset.to_table(columns=list(keys))
    index = {key: row for row, key in enumerate(zip(*(columns[k].to_pylist() for k in keys), strict=True))}
    return SideTable(name, int(dataset.version), keys, content["facts"], index, dataset)
