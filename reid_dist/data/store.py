"""Tables of images and views over them.

A table is one Lance dataset, `<root>/tables/<name>.lance`, written by `jobs.pack` (data/pack.py): one row per image
with its encoded bytes, its SHA-256 and what the dataset says about it. A remote table is read through the node cache:
its columns without the images live in NumPy, images are taken by row and decoded on demand (64 random rows: some
milliseconds).

A `TableView` is a list of rows over one or more tables, joined in order. It is what methods and protocols see.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reid_dist.config import DataConfig
from reid_dist.data.decode import decode
from reid_dist.errors import UserError
from reid_dist.storage import CorruptionError, check_name, is_remote, open_store
from reid_dist.storage.cache import NodeCache

METADATA = b"reid_dist"  # key of the facts in a table's schema
NONE = -1  # no camera, tracklet or frame


def table_uri(root: str, name: str) -> str:
    """Where a table lies. Raises UserError for a name that is none."""
    return f"{root.rstrip('/')}/tables/{check_name(name, 'table')}.lance"


@dataclass(frozen=True, slots=True)
class TableFacts:
    """What a table says about itself; `pack` writes it."""

    layout: str
    source: str  # digest of what was packed: layout, options, every record and file size
    content: str  # digest of all rows in order: the version that a run card names, wherever the table lies
    rows: int
    quarantined: tuple[str, ...] = ()  # files left out because they cannot be decoded
    misnamed: int = 0  # files whose content is another format than their name says
    warnings: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One opened table. `columns`: everything but the images, as NumPy arrays of `rows` entries (captions: tuples)."""

    name: str
    version: int
    facts: TableFacts
    columns: Mapping[str, np.ndarray]
    dataset: Any  # lance.LanceDataset; thread-safe

    def encoded(self, rows: np.ndarray) -> list[bytes]:
        """Encoded images of `rows` (int64 [n], any order, doubles allowed), one take. Raises CorruptionError."""
        unique, inverse = np.unique(rows, return_inverse=True)
        try:
            taken = self.dataset.take(unique, columns=["image"])["image"]
        except (OSError, ValueError) as error:
            raise CorruptionError(f"table {self.name}: cannot be read: {' '.join(str(error).split())[:200]}") from None
        return [taken[int(i)].as_py() for i in inverse]


def open_table(root: str, name: str, version: int | None = None, cache: NodeCache | None = None) -> Table:
    """Open a table, newest version by default. A remote one is copied to the node first.

    Raises UserError when there is no such table or version, StorageError.
    """
    import lance

    uri = table_uri(root, name)
    store = open_store(uri)
    if not store.list("_versions/"):
        there = sorted(
            {e.key.split(".lance/")[0] for e in open_store(f"{root.rstrip('/')}/tables").list() if ".lance/" in e.key}
        )
        raise UserError(
            f"there is no table {name!r} under {root} (found: {', '.join(there) or 'none'}): "
            f"pack it with `python -m jobs.pack LAYOUT SOURCE root={root}`"
        )
    place = (cache or NodeCache()).tree(store) if is_remote(uri) else store.uri
    try:
        dataset = lance.dataset(place, version=version)
    except (OSError, ValueError) as error:
        if version is not None:
            raise UserError(f"table {name} under {root} has no version {version}") from None
        raise CorruptionError(f"table {uri} cannot be opened: {' '.join(str(error).split())[:200]}") from None
    facts = read_facts(dataset)
    try:
        columns = _columns(dataset)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise CorruptionError(f"table {uri} cannot be read: {' '.join(str(error).split())[:200]}") from None
    return Table(name, int(dataset.version), facts, columns, dataset)


def read_facts(dataset: Any) -> TableFacts:
    """The facts of an opened Lance dataset. Raises UserError when it is not one of ours."""
    try:
        content = json.loads((dataset.schema.metadata or {})[METADATA])
    except (KeyError, ValueError):
        raise UserError(f"{dataset.uri} is a Lance dataset, but not one that jobs.pack wrote") from None
    tuples = {key: tuple(content[key]) for key in ("quarantined", "warnings")}
    return TableFacts(**{**content, **tuples})


def _columns(dataset: Any) -> dict[str, np.ndarray]:
    """All columns without the images. Repeated words are one object each, so a million rows stay small."""
    table = dataset.to_table(columns=[name for name in dataset.schema.names if name != "image"])
    columns: dict[str, np.ndarray] = {}
    for name in ("pid", "camid", "tracklet", "frame", "height", "width"):
        columns[name] = table[name].fill_null(NONE).to_numpy().astype(np.int64)
    for name in ("split", "modality", "domain"):
        columns[name] = np.array(table[name].to_pylist(), dtype=np.str_)
    columns["path"] = np.array(table["path"].to_pylist(), dtype=object)
    columns["sha256"] = np.array(table["sha256"].to_pylist(), dtype=object)
    for name in ("captions", "trials"):
        texts = np.empty(table.num_rows, dtype=object)
        texts[:] = [tuple(row or ()) for row in table[name].to_pylist()]
        columns[name] = texts
    return columns


class TableView:
    """Rows over one or more tables, in order. Arrays are read-only, [N] over the view's rows."""

    def __init__(self, tables: Sequence[Table], rows: np.ndarray | None = None, in_trial: int = 0) -> None:
        """`rows`: int64 [N] over the tables' rows laid end to end; None: all. `in_trial`: whose splits are shown."""
        self.tables = tuple(tables)
        self.in_trial = in_trial
        self._starts = np.cumsum([0, *(table.facts.rows for table in self.tables)])
        self.rows = np.arange(self._starts[-1]) if rows is None else np.asarray(rows, dtype=np.int64)
        self._cached: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self) -> str:
        """Names of the tables, for messages."""
        return ", ".join(table.name for table in self.tables) or "(none)"

    def _column(self, name: str) -> np.ndarray:
        if name not in self._cached:
            whole = [table.columns[name] for table in self.tables]
            column = (np.concatenate(whole) if whole else np.empty(0, dtype=np.int64))[self.rows]
            column.flags.writeable = False
            self._cached[name] = column
        return self._cached[name]

    @property
    def pid(self) -> np.ndarray:
        """int64: the dataset's own identity numbers (unique within a domain only)."""
        return self._column("pid")

    @property
    def camid(self) -> np.ndarray:
        """int64, from 0; -1 where the dataset has no cameras."""
        return self._column("camid")

    @property
    def tracklet(self) -> np.ndarray:
        """int64; -1 where there is none."""
        return self._column("tracklet")

    @property
    def frame(self) -> np.ndarray:
        """int64; -1 where there is none."""
        return self._column("frame")

    @property
    def split(self) -> np.ndarray:
        """str: "train", "val", "query", "gallery", "test" ("unused": none of them in this trial)."""
        if not self.in_trial:
            return self._column("split")
        return np.array([trials[self.in_trial] or "unused" for trials in self.trials], dtype=np.str_)

    @property
    def trials(self) -> np.ndarray:
        """object: tuple[str, ...] per row, its split in each trial of its set ("": none); () for sets without trials."""
        return self._column("trials")

    @functools.cached_property
    def num_trials(self) -> int:
        """Trials (train/test divisions) of these rows' sets, 1 for a set without."""
        return max(1, min((len(trials) for trials in self.trials), default=1))

    def trial(self, number: int) -> TableView:
        """The same rows with the splits of one trial, from 0. Raises UserError when there is no such trial."""
        if not 0 <= number < self.num_trials:
            raise UserError(f"{self.describe()}: there is no trial {number}; it has {self.num_trials}, from 0")
        return TableView(self.tables, self.rows, number)

    def trial_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row int64 [M], trial int64 [M], split str [M]): every row once for each trial it takes part in, by trial."""
        if self.num_trials == 1:
            return np.arange(len(self)), np.zeros(len(self), dtype=np.int64), self.split
        splits = np.array([trials[: self.num_trials] for trials in self.trials], dtype=np.str_).T
        trial, row = np.nonzero(splits != "")
        return row, trial, splits[trial, row]

    @property
    def modality(self) -> np.ndarray:
        """str: "rgb" or "ir"."""
        return self._column("modality")

    @property
    def domain_name(self) -> np.ndarray:
        """str: the dataset's name."""
        return self._column("domain")

    @property
    def height(self) -> np.ndarray:
        """int64, pixels as shown."""
        return self._column("height")

    @property
    def width(self) -> np.ndarray:
        """int64, pixels as shown."""
        return self._column("width")

    @property
    def captions(self) -> np.ndarray:
        """object: tuple[str, ...] per row."""
        return self._column("captions")

    @functools.cached_property
    def domain(self) -> np.ndarray:
        """int64: place of the row's domain among this view's domain names, sorted."""
        return np.unique(self.domain_name, return_inverse=True)[1].astype(np.int64)

    @functools.cached_property
    def label(self) -> np.ndarray:
        """int64 0..n-1: place of (domain, pid) among the sorted pairs of this view."""
        if not len(self):
            return np.empty(0, dtype=np.int64)
        pairs = np.stack([self.domain, self.pid], axis=1)
        return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)

    def path(self, row: int) -> str:
        """Path below the dataset's root."""
        return str(self._column("path")[row])

    def digests(self, rows: np.ndarray) -> list[str]:
        """Hex SHA-256 of the encoded images of `rows`: the key of side tables."""
        return [str(digest) for digest in self._column("sha256")[rows]]

    def encoded(self, rows: np.ndarray | Sequence[int]) -> list[bytes]:
        """Encoded images of `rows` of the view, in that order; one take per table. Raises CorruptionError."""
        wanted = self.rows[np.asarray(rows, dtype=np.int64)]
        result: list[bytes] = [b""] * len(wanted)
        owner = np.searchsorted(self._starts, wanted, side="right") - 1
        for number in np.unique(owner):
            places = np.flatnonzero(owner == number)
            images = self.tables[number].encoded(wanted[places] - self._starts[number])
            for place, image in zip(places.tolist(), images, strict=True):
                result[place] = image
        return result

    def images(self, rows: np.ndarray | Sequence[int]) -> list[np.ndarray]:
        """Decoded images of `rows`: uint8 [height, width, 3] each, an array of its own. Thread-safe."""
        numbers = np.asarray(rows, dtype=np.int64)
        return [decode(data, self.path(int(row))) for data, row in zip(self.encoded(numbers), numbers, strict=True)]

    def select(self, chosen: np.ndarray) -> TableView:
        """The rows of a boolean mask [N] or of int64 indices, in that order."""
        chosen = np.asarray(chosen)
        if chosen.dtype == np.bool_ and len(chosen) != len(self):
            raise ValueError(f"mask of {len(chosen)} for a view of {len(self)} rows")
        rows = self.rows[chosen if chosen.dtype == np.bool_ else chosen.astype(np.int64)]
        return TableView(self.tables, rows, self.in_trial)

    def hold_out(self, fraction: float, seed: int) -> tuple[TableView, TableView]:
        """(the rest, rows of `fraction` of the identities). Whole identities, chosen per domain by `seed` alone.

        An identity is held out when its hash lies among the smallest of its domain, so nothing depends on row order,
        and at least one identity stays on each side. Raises UserError when a domain has fewer than two identities.
        """
        if not 0 < fraction < 1:
            raise UserError(f"val_fraction={fraction}: a share between 0 and 1 (both excluded)")
        held = np.zeros(len(self), dtype=bool)
        for domain in np.unique(self.domain):
            here = self.domain == domain
            pids = np.unique(self.pid[here])
            if len(pids) < 2:
                raise UserError(f"{self.describe()}: {len(pids)} training identities are too few to hold some out")
            name = self.domain_name[np.flatnonzero(here)[0]]
            ranked = sorted(pids.tolist(), key=lambda pid: hashlib.sha256(f"{seed}/{name}/{pid}".encode()).digest())
            count = min(max(1, round(fraction * len(pids))), len(pids) - 1)
            held |= here & np.isin(self.pid, ranked[:count])
        return self.select(~held), self.select(held)

    @property
    def versions(self) -> dict[str, dict[str, Any]]:
        """{table: {"version", "content", "rows"}}: what a run's identity and card name."""
        return {
            table.name: {"version": table.version, "content": table.facts.content, "rows": table.facts.rows}
            for table in self.tables
        }


def open_view(data: DataConfig, names: Sequence[str], splits: Sequence[str] = ()) -> TableView:
    """The rows of tables `names` under `data.root` whose split is one of `splits` (empty: all), in table order.

    Splits are those of division `data.trial` of sets that have several. Raises UserError when there is no such division.
    """
    doubled = sorted({name for name in names if list(names).count(name) > 1})
    if doubled:
        raise UserError(f"table {', '.join(doubled)} is named twice")
    cache = NodeCache(data.cache, data.cache_gb)
    view = TableView([open_table(data.root, name, cache=cache) for name in names]).trial(data.trial)
    return view.select(np.isin(view.split, list(splits))) if splits else view
