"""A run's metrics in storage: JSON lines in numbered parts per attempt, merged when read.

An object store cannot append, so every flush writes one more part. An attempt that continues from a checkpoint repeats
steps an earlier one had already recorded; the reader keeps the latest record of each (kind, step).
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

from reid_dist.runs.redact import redact
from reid_dist.storage import Store

FLUSH_EVERY_S = 60.0


class MetricsWriter:
    """Buffers records; `flush` stores them. Thread-safe."""

    def __init__(self, store: Store, attempt: int) -> None:
        self._store, self._attempt = store, attempt
        self._lines: list[str] = []
        self._lock = threading.Lock()
        self._next: int | None = None
        self._flushed = time.monotonic()

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep one record; stored at the next flush, at the latest after FLUSH_EVERY_S seconds with a record."""
        with self._lock:
            self._lines.append(json.dumps(redact(dict(record))))
        if time.monotonic() - self._flushed > FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Store what is buffered. Raises StorageError; then the records stay buffered."""
        with self._lock:
            if not self._lines:
                return
            if self._next is None:  # a worker that starts again within the attempt counts on
                parts = [entry.key for entry in self._store.list(f"metrics/{self._attempt:04d}-")]
                self._next = 1 + max((int(part.split("-")[1]) for part in parts), default=0)
            name = f"metrics/{self._attempt:04d}-{self._next:06d}-{uuid.uuid4().hex[:6]}.jsonl"
            self._store.write(name, ("\n".join(self._lines) + "\n").encode())
            self._lines.clear()
            self._next += 1
            self._flushed = time.monotonic()


def read_metrics(store: Store) -> list[dict[str, Any]]:
    """All records of a run, one per (kind, step): the latest attempt's. Ordered by step, then by first appearance."""
    merged: dict[tuple[Any, Any], dict[str, Any]] = {}
    for entry in store.list("metrics/"):  # sorted by attempt, then part
        for line in store.read(entry.key).decode().splitlines():
            record = json.loads(line)
            merged[record.get("kind"), record.get("step")] = record
    return sorted(merged.values(), key=lambda record: record.get("step") or 0)
