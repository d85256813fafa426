"""The form of an image table: columns, data files, and the commit that makes files a version. No Ray in here.

A data file holds consecutive rows and is named by (tag, number), where the tag is the source digest's beginning:
writing it twice gives the same bytes under the same name. A version refers to its files; files that no version names
are nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from reid_dist.data.store import METADATA, TableFacts
from reid_dist.storage import StorageError, Store, lance_options, open_store

FILE_VERSION = "2.1"  # of Lance's data files

SCHEMA = pa.schema(
    [
        pa.field("image", pa.large_binary(), nullable=False),  # as encoded by the dataset's authors
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("pid", pa.int64(), nullable=False),
        pa.field("camid", pa.int64()),
        pa.field("modality", pa.string(), nullable=False),
        pa.field("tracklet", pa.int64()),
        pa.field("frame", pa.int64()),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("trials", pa.list_(pa.string()), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
    ]
)


def file_key(tag: str, number: int) -> str:
    """Key of a data file below the table."""
    return f"data/{tag}-{number:06d}.lance"


def store_file(rows: pa.Table, store: Store, key: str) -> int:
    """Write a Lance data file locally and publish it; returns its bytes."""
    from lance.file import LanceFileWriter

    with tempfile.TemporaryDirectory(prefix="reid-pack-") as folder:
        path = os.path.join(folder, "file.lance")
        with LanceFileWriter(path, SCHEMA, version=FILE_VERSION) as writer:
            for batch in rows.to_batches():
                writer.write_batch(batch)
        store.upload(key, path)
        return os.path.getsize(path)


def commit(uri: str, tag: str, results: Sequence[Mapping[str, Any]], facts: TableFacts) -> int:
    """Make data files the table's next version, which it returns. `results`: {"chunk", "rows", "size"} in row order.

    Raises StorageError when one of them is not there as it was written.
    """
    import lance
    from lance.fragment import DataFile, FragmentMetadata

    files = [result for result in results if result["rows"]]
    there = {entry.key: entry.size for entry in open_store(uri).list("data/")}
    for result in files:
        if there.get(file_key(tag, result["chunk"])) != result["size"]:
            raise StorageError(f"{uri}: data file {result['chunk']} vanished before the commit; run the pack again")
    major, minor = (int(part) for part in FILE_VERSION.split("."))
    leaves = _leaf_ids(SCHEMA)
    fragments = [
        FragmentMetadata(
            id=place,
            files=[
                DataFile(
                    file_key(tag, result["chunk"]).removeprefix("data/"),
                    fields=leaves,
                    column_indices=list(range(len(leaves))),
                    file_major_version=major,
                    file_minor_version=minor,
                    file_size_bytes=result["size"],
                )
            ],
            physical_rows=result["rows"],
        )
        for place, result in enumerate(files)
    ]
    schema = SCHEMA.with_metadata({METADATA: json.dumps(dataclasses.asdict(facts), sort_keys=True).encode()})
    try:
        dataset = lance.LanceDataset.commit(
            uri, lance.LanceOperation.Overwrite(schema, fragments), storage_options=lance_options(uri) or None
        )
    except OSError as error:
        raise StorageError(f"{uri}: the commit failed: {' '.join(str(error).split())[:200]}") from None
    return int(dataset.version)


def _leaf_ids(schema: pa.Schema) -> list[int]:
    """Lance numbers fields in pre-order, a list before its items; only leaves have a column in a data file."""
    leaves: list[int] = []
    number = 0
    for item in schema:
        if pa.types.is_list(item.type):
            number += 1
        leaves.append(number)
        number += 1
    return leaves


def referenced_files(uri: str) -> set[str]:
    """Keys of the data files that any version of a table needs; empty when there is no table."""
    import lance

    if not open_store(uri).list("_versions/"):
        return set()
    options = lance_options(uri) or None
    versions = [v["version"] for v in lance.dataset(uri, storage_options=options).versions()]
    opened = [lance.dataset(uri, version=version, storage_options=options) for version in versions]
    return {f"data/{file.path}" for ds in opened for fragment in ds.get_fragments() for file in fragment.data_files()}
