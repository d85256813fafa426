"""Small tables for tests, made by the pack job's own functions without Ray."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from reid_dist.data import pack, tables
from reid_dist.data.records import ParsedDataset, Record
from reid_dist.data.store import table_uri
from reid_dist.storage import open_store


def jpeg(number: int, height: int = 32, width: int = 16) -> bytes:
    """A JPEG of noise that is `number`'s alone."""
    image = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write_table(
    root: str, name: str, records: Sequence[Record], images: Sequence[bytes], raw: Path, chunk: int = 4
) -> int:
    """Write images below `raw` and pack them into the table; returns its version."""
    for record, image in zip(records, images, strict=True):
        path = raw / record.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return pack_tree(root, name, records, raw, chunk)


def pack_tree(root: str, name: str, records: Sequence[Record], raw: Path, chunk: int = 4) -> int:
    """Pack records whose images lie below `raw` (a path may name a box of one); returns the table's version."""
    place = open_store(root).uri
    uri = table_uri(place, name)
    parsed = ParsedDataset(name=name, records=tuple(records))
    sizes = {record.path: (raw / record.path.partition("#")[0]).stat().st_size for record in records}
    todo = pack.Plan(name, name, str(raw), place, uri, pack.source_digest(name, parsed, sizes, {}), parsed, None)
    results = []
    for number in range(-(-len(records) // chunk)):
        part = records[number * chunk : (number + 1) * chunk]
        done = pack._write_chunk(number, part, str(raw), uri, todo.tag, "stop")
        results.append({"chunk": number, "images": len(part), **done})
    return tables.commit(uri, todo.tag, results, pack._facts(todo, results))
