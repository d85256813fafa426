"""Packing: a raw dataset tree becomes one Lance table. The only file of data/ that uses Ray.

The driver parses the tree (data/layouts) and cuts the records into chunks of CHUNK rows. Ray Data tasks read a chunk's
images, decode each once to be sure of it, hash them, and write one Lance data file; only paths travel in and file facts
out, images never enter the object store. The driver commits all files in chunk order, so that rows, files and their
bytes are the same whatever the number of tasks. A data file's name is (digest of the source, chunk number): a task that
runs twice writes the same file twice, and a failed pack knows exactly what to remove. Until the commit there is no
table (or still the old version). A set of tracklets gets a second, small table after it (data/tracklets.py).

The source digest covers layout, options, every record and every file's size: when a table has it, there is nothing to
do. (An image replaced by another of the same number of bytes is therefore not noticed; pack under another name, or
remove the table.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from reid_dist.data import layouts
from reid_dist.data.decode import DecodeError, inspect
from reid_dist.data.layouts.base import SYNTHETIC_MARKER
from reid_dist.data.members import load_image
from reid_dist.data.records import DatasetError, ParsedDataset, Record
from reid_dist.data.store import TableFacts, read_facts, table_uri
from reid_dist.data.tables import SCHEMA, commit, file_key, referenced_files, store_file
from reid_dist.data.tracklets import has_tracklets, write_tracklets
from reid_dist.errors import RunError, UserError
from reid_dist.storage import StorageError, Store, lance_options, open_store

logger = logging.getLogger(__name__)

PACK_VERSION = 1  # raise it when the same source gives another table
CHUNK = 1024  # rows of one data file; part of what makes two packs the same
READERS = 8  # threads per task that fetch images


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pack would do. `present`: the facts of the table that is already there with this source, else None."""

    layout: str
    name: str
    source: str  # URI
    root: str  # URI below which it lies
    uri: str  # of the table
    digest: str  # of the source
    parsed: ParsedDataset
    present: TableFacts | None

    @property
    def tag(self) -> str:
        """What the table's data files are named by."""
        return self.digest[:16]

    @property
    def chunks(self) -> int:
        """Number of data files."""
        return -(-len(self.parsed.records) // CHUNK)

    def record(self) -> dict[str, Any]:
        """What is known before anything is packed."""
        return {
            "table": self.name,
            "uri": self.uri,
            "layout": self.layout,
            "source": self.source,
            "images": len(self.parsed.records),
            "splits": self.parsed.counts(),
            "ignored": len(self.parsed.ignored),
            "warnings": list(self.parsed.warnings),
            "files": self.chunks,
            "up_to_date": self.present is not None,
        }


def plan(layout: str, source: str, root: str, *, name: str = "", on_error: str = "stop", **options: Any) -> Plan:
    """Parse the tree at `source` and look whether `<root>/tables/<name>.lance` (default: the layout's name) holds it
    already.

    `options` go to the layout's parser. Raises UserError (DatasetError for the tree's faults), StorageError.
    """
    if on_error not in ("stop", "quarantine"):
        raise UserError(f"on_error={on_error!r}: choose stop or quarantine")
    chosen = layouts.get(layout)
    if chosen.options.get("domain") == "":  # a form that many datasets have: each is its own
        options.setdefault("domain", name or chosen.name)
    store = open_store(source)
    parsed = chosen.parse(store, **options)
    if not parsed.records:
        raise DatasetError(f"{store.uri}: no images of layout {layout} are there")
    sizes = {entry.key: entry.size for entry in store.list()}
    if SYNTHETIC_MARKER in sizes:
        drawn = store.read(SYNTHETIC_MARKER).decode("utf-8")
        parsed = dataclasses.replace(parsed, notes={**parsed.notes, "synthetic": drawn})
    digest = source_digest(chosen.name, parsed, sizes, options)
    root, name = open_store(root).uri, name or chosen.name
    uri = table_uri(root, name)
    present = _facts_there(uri)
    same = present is not None and present.source == digest and (on_error == "quarantine" or not present.quarantined)
    if present is not None and same and any(record.tracklet is not None for record in parsed.records):
        same = has_tracklets(root, name, present.content)
    return Plan(chosen.name, name, store.uri, root, uri, digest, parsed, present if same else None)


def source_digest(layout: str, parsed: ParsedDataset, sizes: Mapping[str, int], options: Mapping[str, Any]) -> str:
    """Hex SHA-256 of what a table is made from. Raises DatasetError for a record whose file is not there."""
    digest = hashlib.sha256(
        json.dumps([PACK_VERSION, CHUNK, layout, dict(options)], sort_keys=True, default=str).encode()
    )
    for record in parsed.records:
        file = record.path if record.path in sizes else record.path.partition("#")[0]
        if file not in sizes:
            raise DatasetError(f"{record.path}: this image is named by the annotations, but it is not there")
        digest.update(json.dumps([dataclasses.astuple(record), sizes[file]]).encode())
    return digest.hexdigest()


def _facts_there(uri: str) -> TableFacts | None:
    import lance

    if not open_store(uri).list("_versions/"):
        return None
    return read_facts(lance.dataset(uri, storage_options=lance_options(uri) or None))


def pack(todo: Plan, on_error: str = "stop", progress: bool = True) -> dict[str, Any]:
    """Carry out a plan on the connected Ray cluster. Returns the record of `jobs.pack`.

    Raises DecodeError naming the file (on_error="stop"), DatasetError when nothing is left, StorageError. Then no table
    is made and an older version stays as it was.
    """
    started = time.monotonic()
    if todo.present is not None:
        logger.info("%s holds this source already: nothing to do", todo.uri)
        return {**todo.record(), **_outcome(todo.present), "packed": 0, "seconds": 0.0}
    store = open_store(todo.uri)
    try:
        results = _run_chunks(todo, store, on_error, progress)
        facts = _facts(todo, results)
        version = commit(todo.uri, todo.tag, results, facts)
        tracklets = write_tracklets(todo.root, todo.name, facts.content)
    except BaseException:
        _remove_files(todo, store)
        raise
    seconds = time.monotonic() - started
    speed = {"seconds": round(seconds, 2), "images_per_second": round(facts.rows / seconds, 1)}
    logger.info("%s: %d images packed in %.1f s", todo.uri, facts.rows, seconds)
    more = {"tracklets": tracklets} if tracklets else {}
    return {**todo.record(), **_outcome(facts), **more, "version": version, "packed": facts.rows, **speed}


def _outcome(facts: TableFacts) -> dict[str, Any]:
    return {
        "rows": facts.rows,
        "content": facts.content,
        "quarantined": list(facts.quarantined),
        "misnamed": facts.misnamed,
    }


# --- the chunks


def _run_chunks(todo: Plan, store: Store, on_error: str, progress: bool) -> list[dict[str, Any]]:
    """Results of all chunks in order. After the first failure the tasks not yet begun do nothing; all are waited for."""
    import ray.data
    from tqdm import tqdm

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our own bar says how far it is
    stop = f".tmp-stop-{uuid.uuid4().hex}"
    call = {"source": todo.source, "table": todo.uri, "tag": todo.tag, "on_error": on_error, "stop": stop}
    parts = [todo.parsed.records[i * CHUNK : (i + 1) * CHUNK] for i in range(todo.chunks)]
    rows = [{"chunk": i, "records": json.dumps(list(map(dataclasses.asdict, part)))} for i, part in enumerate(parts)]
    chunks = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _pack_chunk, batch_size=1, batch_format="pandas", fn_kwargs=call
    )
    results: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    total = len(todo.parsed.records)
    bar = tqdm(total=total, desc=f"pack {todo.name}", unit="image", disable=not progress, mininterval=0.5)
    try:
        with bar:
            for answer in chunks.iter_rows():
                result = json.loads(answer["result"])
                bar.update(result["images"])
                (failed if "error" in result else results).append(result)
                if "error" in result and len(failed) == 1:
                    with contextlib.suppress(RunError):  # then the others run to their end
                        store.write(stop, b"")
    finally:
        with contextlib.suppress(RunError):
            store.delete(stop)
    if failed:
        first = min((f for f in failed if f["kind"] != "skipped"), key=lambda f: f["chunk"])
        raise {"decode": DecodeError, "dataset": DatasetError}.get(first["kind"], StorageError)(first["error"])
    return sorted(results, key=lambda result: result["chunk"])


def _pack_chunk(batch: Any, source: str, table: str, tag: str, on_error: str, stop: str) -> Any:
    """Ray Data task: one chunk (one row of `batch`). Failures come back as results, so that nothing is cancelled
    half-way.
    """
    import pandas

    number, records = int(batch["chunk"][0]), json.loads(batch["records"][0])
    result: dict[str, Any] = {"chunk": number, "images": len(records)}
    try:
        if open_store(table).exists(stop):
            result |= {"kind": "skipped", "error": "another chunk failed"}
        else:
            result |= _write_chunk(number, [Record(**record) for record in records], source, table, tag, on_error)
    except DecodeError as error:
        result |= {"kind": "decode", "error": str(error)}
    except DatasetError as error:
        result |= {"kind": "dataset", "error": str(error)}
    except (StorageError, OSError) as error:
        result |= {"kind": "storage", "error": str(error)}
    return pandas.DataFrame({"result": [json.dumps(result)]})


def _write_chunk(
    number: int, records: Sequence[Record], source: str, table: str, tag: str, on_error: str
) -> dict[str, Any]:
    """Read, verify, hash and store one chunk. Raises DecodeError, DatasetError, StorageError."""
    rows: list[dict[str, Any]] = []
    quarantined: list[str] = []
    misnamed = 0
    for record, data in _images(open_store(source), records):
        try:
            facts = inspect(data, record.path)
        except DecodeError:
            if on_error == "stop":
                raise
            quarantined.append(record.path)
            continue
        misnamed += facts.misnamed
        fields = {**dataclasses.asdict(record), "captions": list(record.captions)}
        rows.append(
            {
                **fields,
                "image": data,
                "sha256": hashlib.sha256(data).hexdigest(),
                "height": facts.height,
                "width": facts.width,
            }
        )
    done: dict[str, Any] = {"rows": len(rows), "quarantined": quarantined, "misnamed": misnamed, "size": 0}
    plain = [{key: value for key, value in row.items() if key != "image"} for row in rows]
    done["digest"] = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    if rows:
        done["size"] = store_file(pa.Table.from_pylist(rows, schema=SCHEMA), open_store(table), file_key(tag, number))
    return done


def _images(store: Store, records: Sequence[Record]) -> Iterator[tuple[Record, bytes]]:
    """Records with their bytes, in order, READERS ahead."""

    def read(record: Record) -> bytes:
        try:
            return load_image(store, record.path)
        except FileNotFoundError:
            raise DatasetError(f"{store.uri}/{record.path} is gone, or this node does not see that folder") from None

    with ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="pack") as pool:
        for start in range(0, len(records), 4 * READERS):
            some = records[start : start + 4 * READERS]
            yield from zip(some, pool.map(read, some), strict=True)


# --- the end


def _facts(todo: Plan, results: Sequence[Mapping[str, Any]]) -> TableFacts:
    """Raises DatasetError when every image was quarantined."""
    rows = sum(result["rows"] for result in results)
    quarantined = tuple(path for result in results for path in result["quarantined"])
    if rows == 0:
        raise DatasetError(f"{todo.source}: none of the {len(quarantined)} images can be decoded")
    if quarantined:
        logger.warning("%s: %d images quarantined, first %s", todo.name, len(quarantined), quarantined[0])
    return TableFacts(
        layout=todo.layout,
        source=todo.digest,
        content=hashlib.sha256("".join(result["digest"] for result in results).encode()).hexdigest(),
        rows=rows,
        quarantined=quarantined,
        misnamed=sum(result["misnamed"] for result in results),
        warnings=todo.parsed.warnings,
        notes=dict(todo.parsed.notes),
    )


def _remove_files(todo: Plan, store: Store) -> None:
    """Undo a failed pack: its data files, unless a version of the table refers to them."""
    with contextlib.suppress(RunError):
        kept = referenced_files(todo.uri)
        for entry in store.list(f"data/{todo.tag}-"):
            if entry.key not in kept:
                store.delete(entry.key)
